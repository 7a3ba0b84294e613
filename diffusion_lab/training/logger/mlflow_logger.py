"""MLflow: a database in outputs/, or a server."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from PIL import Image

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.common.files import OUTPUTS, one_at_a_time
from diffusion_lab.common.messages import package
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.logger.run_logger import Row, RunLogger, no_connection, numbers_of

FOLDER = OUTPUTS / "mlflow"  # the database, and the pictures of its runs
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
            FOLDER.mkdir(parents=True, exist_ok=True)
            # MLflow makes the tables of a new database without waiting for others that do
            with one_at_a_time(FOLDER / ".lock"):
                self._connect()
            return f"MLflow: mlflow server --backend-store-uri {local_store(Path())}"
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
        client = MlflowClient(self.uri)
        found = client.search_runs([self._place(client)], f"tags.`{RUN}` = '{self.facts[RUN]}'")
        MLFlowLogger.__init__(
            self,
            experiment_name=self.experiment_name,
            run_name=self.run_name,
            tracking_uri=self.uri,
            tags=self.facts,
            run_id=found[0].info.run_id if found else None,
        )
        known = {}
        if found:
            self._last, known = {}, found[0].data.params
            client.update_run(self.run_id, status="RUNNING")
        settings = {NO_NAME.sub("_", key): value for key, value in flat(self.config).items()}
        # a parameter cannot change, as trainer.max_steps may when a run is resumed
        MLFlowLogger.log_hyperparams(self, {k: v for k, v in settings.items() if k not in known})

    def _place(self, client: Any) -> str:
        """The id of the experiment, which is made if there is none."""
        if found := client.get_experiment_by_name(self.experiment_name):
            return found.experiment_id
        own = (FOLDER / "artifacts").resolve().as_uri() if self.uri == local_store() else None
        return client.create_experiment(self.experiment_name, artifact_location=own)

    def write(self, row: Row, step: int) -> None:
        if self._last is not None:
            row = {name: value for name, value in row.items() if step > self._last_step(name)}
        if row:
            MLFlowLogger.log_metrics(self, row, step)

    def _last_step(self, name: str) -> int:
        """The last step that a resumed run finds of a name."""
        assert self._last is not None
        if name not in self._last:
            history = self.experiment.get_metric_history(self.run_id, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]

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


def local_store(start: Path | None = None) -> str:
    """The address of the database in outputs/, from the root or another folder."""
    file = FOLDER / "mlflow.db"
    return f"sqlite:///{file.resolve() if start is None else start / file}"
