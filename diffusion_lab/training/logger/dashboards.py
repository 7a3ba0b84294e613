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
from PIL import Image

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.common.files import OUTPUTS, one_at_a_time
from diffusion_lab.common.messages import package
from diffusion_lab.training.logger.run_logger import (
    Clock,
    Row,
    RunLogger,
    no_connection,
    numbers_of,
)


class TensorBoard(RunLogger, TensorBoardLogger):
    """Event files in the run folder; a resumed run hides what came after its checkpoint."""

    title = "TensorBoard"

    def __init__(self, run_dir: Path, clock: Clock, config: dict, resumed_from: int):
        RunLogger.__init__(self, run_dir, clock, config, resumed_from)
        TensorBoardLogger.__init__(
            self,
            save_dir=str(run_dir),
            name="",
            version="tensorboard",
            default_hp_metric=False,
            purge_step=resumed_from + 1,  # TensorBoard drops this and later steps of older files
        )

    @classmethod
    def require(cls) -> None:
        package("tensorboard", "tensorboard", "logger=tensorboard")

    def open(self) -> str:
        """Writes the hyperparameters of the HParams page.

        Lightning's own method also declares which of them exist, by the first run that
        TensorBoard finds; runs of another backbone would lack theirs.
        """
        from torch.utils.tensorboard.summary import hparams

        shown = bool | int | float | str  # by TensorBoard
        settings = flat(self.config).items()
        _, session, _ = hparams({k: v if isinstance(v, shown) else str(v) for k, v in settings}, {})
        self.experiment._get_file_writer().add_summary(session)
        self.experiment.flush()
        return f"TensorBoard: tensorboard --logdir {OUTPUTS}"

    def write(self, row: Row, step: int) -> None:
        TensorBoardLogger.log_metrics(self, row, step)
        self.experiment.flush()

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
        self.experiment.add_image(name, pixels, step, dataformats="HWC")
        self.experiment.flush()

    def close(self, summary: Row | None) -> None:
        if summary:
            TensorBoardLogger.log_metrics(self, numbers_of(summary), summary["steps"])
        self.experiment.close()


DATABASES = OUTPUTS / "mlflow"  # MLflow's database, and the pictures of its runs
RUN = "diffusion_lab.run_id"  # the tag by which a resumed run is found
NO_NAME = re.compile(r"[^\w./: -]")  # what names of parameters must not contain
# so that a server that goes away holds training up for seconds, and not for MLflow's minutes
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MLflow(RunLogger, MLFlowLogger):  # type: ignore[misc]
    """A run in MLflow's database, or on its server, that a resumed run continues.

    Rows cannot be deleted there, so a resumed run leaves out those that it finds.
    """

    title = "MLflow"

    def __init__(
        self,
        run_dir: Path,
        clock: Clock,
        config: dict,
        resumed_from: int,
        run_id: str,
        tracking_uri: str | None = None,
        experiment: str = "diffusion-lab",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ):
        RunLogger.__init__(self, run_dir, clock, config, resumed_from)
        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local_store()
        self.experiment_name = experiment
        self.run_name = name or self.label()
        self.facts = {RUN: run_id, "group": group or "", "tags": ", ".join(tags or [])}
        self._last: dict[str, int] | None = None  # last steps of names; None: it is a new run

    @classmethod
    def require(cls) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read by the import
        package("mlflow", "mlflow", "logger=mlflow")

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def version(self) -> str:
        return self.facts[RUN]

    def open(self) -> str:
        if self.uri == local_store():
            DATABASES.mkdir(parents=True, exist_ok=True)
            # MLflow makes the tables of a new database without waiting for others that do
            with one_at_a_time(DATABASES / ".lock"):
                self._connect()
            return f"MLflow: mlflow server --backend-store-uri sqlite:///{DATABASES / 'mlflow.db'}"
        if self.uri.startswith("http") and (reason := no_connection(self.uri)):
            raise ConnectionError(reason)
        self._connect()
        return f"MLflow: {self.uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def _connect(self) -> None:
        """Finds the run, or makes one, and adds the settings that it does not have."""
        from mlflow.tracking import MlflowClient

        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        client: Any = MlflowClient(self.uri)
        if known := client.get_experiment_by_name(self.experiment_name):
            place = known.experiment_id
        else:
            own = (DATABASES / "artifacts").resolve().as_uri()
            artifacts = own if self.uri == local_store() else None
            place = client.create_experiment(self.experiment_name, artifact_location=artifacts)
        found = client.search_runs([place], f"tags.`{RUN}` = '{self.facts[RUN]}'")
        MLFlowLogger.__init__(
            self,
            experiment_name=self.experiment_name,
            run_name=self.run_name,
            tracking_uri=self.uri,
            tags=self.facts,
            run_id=found[0].info.run_id if found else None,
        )
        there = {}
        if found:
            self._last, there = {}, found[0].data.params
            client.update_run(self.run_id, status="RUNNING")
        settings = {NO_NAME.sub("_", key): value for key, value in flat(self.config).items()}
        # a parameter cannot change, as trainer.max_steps may when a run is resumed
        MLFlowLogger.log_hyperparams(self, {k: v for k, v in settings.items() if k not in there})

    def write(self, row: Row, step: int) -> None:
        if self._last is not None:
            for name in row.keys() - self._last.keys():
                history = self.experiment.get_metric_history(self.run_id, name)
                self._last[name] = max((metric.step for metric in history), default=-1)
            row = {name: value for name, value in row.items() if step > self._last[name]}
        if row:
            MLFlowLogger.log_metrics(self, row, step)

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        client, drawn = self.experiment, f"images/{name.replace('/', '~')}+step+{step}+"
        there = client.list_artifacts(self.run_id, "images") if self._last is not None else []
        if any(file.path.startswith(drawn) for file in there):
            return
        with Image.open(path) as image:
            client.log_image(self.run_id, image, key=name, step=step, synchronous=True)

    def close(self, summary: Row | None) -> None:
        status = "FAILED"
        if summary:
            self.write(numbers_of(summary), summary["steps"])
            status = "FINISHED" if summary["finished"] else "KILLED"
        self.experiment.set_terminated(self.run_id, status)


def local_store() -> str:
    """The address of MLflow's database in outputs/."""
    return f"sqlite:///{(DATABASES / 'mlflow.db').resolve()}"


class Trackio(RunLogger):
    """A run in Trackio's database, which a resumed run continues after the last step there.

    Trackio writes twice a second, so a process that is killed may lose the rows in between there.
    """

    title = "Trackio"

    def __init__(
        self,
        run_dir: Path,
        clock: Clock,
        config: dict,
        resumed_from: int,
        run_id: str,
        project: str = "diffusion-lab",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ):
        super().__init__(run_dir, clock, config, resumed_from)
        # the name is all by which Trackio finds a run again
        own = f"{name or self.label()}-{run_id}"
        self.facts: Row = {"project": project, "name": own, "group": group}
        self.settings = flat(config) | {"tags": ", ".join(tags or [])}

    @classmethod
    def require(cls) -> None:
        folder = (OUTPUTS / "trackio").resolve()  # of databases, and the pictures of their runs
        os.environ.setdefault("TRACKIO_DIR", str(folder))  # it is read by the import
        package("trackio", "trackio", "logger=trackio")

    @property
    def name(self) -> str:
        return self.facts["project"]

    @property
    def version(self) -> str:
        return self.facts["name"]

    def open(self) -> str:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        last = SQLiteStorage.get_max_step_for_run(self.name, self.version)
        self._last = -1 if last is None else last
        with redirect_stdout(StringIO()):  # it says what the line below says
            self.run = trackio.init(**self.facts, config=self.settings, resume="allow", embed=False)
        place = os.environ["TRACKIO_DIR"]
        return f"Trackio: TRACKIO_DIR={place} trackio show --project {self.name}"

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
