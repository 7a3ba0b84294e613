"""TensorBoard, MLflow and Trackio: dashboards without an account."""

import logging
import os
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from PIL import Image

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.common.files import OUTPUTS, one_at_a_time
from diffusion_lab.common.messages import package
from diffusion_lab.common.ranges import settings
from diffusion_lab.training.logger.run_logger import (
    GroupedLogger,
    Row,
    RunLogger,
    no_connection,
    numbers_of,
)


@settings
class TensorBoard(RunLogger):
    """Event files in the run folder; a resumed run hides what came after its checkpoint."""

    title = "TensorBoard"

    @classmethod
    def require(cls) -> None:
        package("tensorboard", "tensorboard", "logger=tensorboard")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, as in Lightning's logger, for callbacks of others."""
        return self.board.experiment

    def open(self) -> str:
        """Writes the hyperparameters of the HParams page.

        Lightning's own method also declares which of them exist, by the first run that
        TensorBoard finds; runs of another backbone would lack theirs.
        """
        from torch.utils.tensorboard.summary import hparams

        self.board = TensorBoardLogger(
            str(self.run_dir),
            name="",
            version="tensorboard",
            default_hp_metric=False,
            purge_step=self.resumed_from + 1,  # this and later steps of older files are dropped
        )
        shown = bool | int | float | str  # by TensorBoard
        values = {k: v if isinstance(v, shown) else str(v) for k, v in flat(self.config).items()}
        _, session, _ = hparams(values, {})
        self.experiment._get_file_writer().add_summary(session)
        self.experiment.flush()
        return f"TensorBoard: tensorboard --logdir {OUTPUTS}"

    def write(self, row: Row, step: int) -> None:
        self.board.log_metrics(row, step)
        self.experiment.flush()

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
        self.experiment.add_image(name, pixels, step, dataformats="HWC")
        self.experiment.flush()

    def close(self, summary: Row | None) -> None:
        if summary:
            self.board.log_metrics(numbers_of(summary), summary["steps"])
        self.experiment.close()


DATABASES = OUTPUTS / "mlflow"  # MLflow's database, and the pictures of its runs
RUN = "diffusion_lab.run_id"  # the tag by which a resumed run is found
NO_NAME = re.compile(r"[^\w./: -]")  # what names of parameters must not contain
# so that a server that goes away holds training up for seconds, and not for MLflow's minutes
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@settings
class MLflow(GroupedLogger):
    """A run in MLflow's database, or on its server, that a resumed run continues.

    Rows cannot be deleted there, so a resumed run leaves out those that it finds.
    """

    title = "MLflow"

    tracking_uri: str | None = None
    experiment: str = "diffusion-lab"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local_store()
        self._last: dict[str, int] | None = None  # last steps of names; None: it is a new run

    @classmethod
    def require(cls) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read by the import
        package("mlflow", "mlflow", "logger=mlflow")

    def open(self) -> str:
        if self.uri == local_store():
            # MLflow makes the tables of a new database without waiting for others that do
            with one_at_a_time(DATABASES / ".lock"):
                self._connect()
            return f"MLflow: mlflow server --backend-store-uri sqlite:///{DATABASES / 'mlflow.db'}"
        if self.uri.startswith("http") and (reason := no_connection(self.uri)):
            raise ConnectionError(reason)
        self._connect()
        place = f"experiments/{self.store.experiment_id}/runs/{self.store.run_id}"
        return f"MLflow: {self.uri}/#/{place}"

    def _connect(self) -> None:
        """Finds the run, or makes one, and adds the settings that it does not have."""
        from mlflow.tracking import MlflowClient

        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self.client: Any = MlflowClient(self.uri)
        if known := self.client.get_experiment_by_name(self.experiment):
            place = known.experiment_id
        else:
            own = (DATABASES / "artifacts").resolve().as_uri()
            artifacts = own if self.uri == local_store() else None
            place = self.client.create_experiment(self.experiment, artifact_location=artifacts)
        found = self.client.search_runs([place], f"tags.`{RUN}` = '{self.run_id}'")
        self.store = MLFlowLogger(
            experiment_name=self.experiment,
            run_name=self.name,
            tracking_uri=self.uri,
            tags={RUN: self.run_id, "group": self.group or "", "tags": ", ".join(self.tags or [])},
            run_id=found[0].info.run_id if found else None,
        )
        there = {}
        if found:
            self._last, there = {}, found[0].data.params
            self.client.update_run(self.store.run_id, status="RUNNING")
        values = {NO_NAME.sub("_", key): value for key, value in flat(self.config).items()}
        # a parameter cannot change, as trainer.max_steps may when a run is resumed
        self.store.log_hyperparams({k: v for k, v in values.items() if k not in there})

    def write(self, row: Row, step: int) -> None:
        if self._last is not None:
            for name in row.keys() - self._last.keys():
                history = self.client.get_metric_history(self.store.run_id, name)
                self._last[name] = max((metric.step for metric in history), default=-1)
            row = {name: value for name, value in row.items() if step > self._last[name]}
        if row:
            self.store.log_metrics(row, step)

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        run, drawn = self.store.run_id, f"images/{name.replace('/', '~')}+step+{step}+"
        there = self.client.list_artifacts(run, "images") if self._last is not None else []
        if any(file.path.startswith(drawn) for file in there):
            return
        with Image.open(path) as image:
            self.client.log_image(run, image, key=name, step=step, synchronous=True)

    def close(self, summary: Row | None) -> None:
        status = "FAILED"
        if summary:
            self.write(numbers_of(summary), summary["steps"])
            status = "FINISHED" if summary["finished"] else "KILLED"
        self.client.set_terminated(self.store.run_id, status)


def local_store() -> str:
    """The address of MLflow's database in outputs/."""
    return f"sqlite:///{(DATABASES / 'mlflow.db').resolve()}"


@settings
class Trackio(GroupedLogger):
    """A run in Trackio's database, which a resumed run continues after the last step there.

    Trackio writes twice a second, so a process that is killed may lose the rows in between there.
    """

    title = "Trackio"

    project: str = "diffusion-lab"

    @classmethod
    def require(cls) -> None:
        folder = (OUTPUTS / "trackio").resolve()  # of databases, and the pictures of their runs
        os.environ.setdefault("TRACKIO_DIR", str(folder))  # it is read by the import
        package("trackio", "trackio", "logger=trackio")

    def open(self) -> str:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{self.name}-{self.run_id}"  # all by which Trackio finds a run again
        last = SQLiteStorage.get_max_step_for_run(self.project, name)
        self._last = -1 if last is None else last
        facts = {"project": self.project, "name": name, "group": self.group}
        values = flat(self.config) | {"tags": ", ".join(self.tags or [])}
        with redirect_stdout(StringIO()):  # it says what the line below says
            self.run = trackio.init(**facts, config=values, resume="allow", embed=False)
        place = os.environ["TRACKIO_DIR"]
        return f"Trackio: TRACKIO_DIR={place} trackio show --project {self.project}"

    def write(self, row: Row, step: int) -> None:
        if step > self._last:
            self.run.log(row, step)

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        import trackio

        self.write(self.new({name: trackio.Image(path, caption=caption)}, step), step)

    def close(self, summary: Row | None) -> None:
        import trackio

        if summary:
            self.run.log(numbers_of(summary), summary["steps"])
        with redirect_stdout(StringIO()):
            trackio.finish()
