"""A table of metrics in a run folder, for spreadsheets."""

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from diffusion_lab.training.clock import Clock
from diffusion_lab.training.logger.run_logger import Row, RunLogger

FOLDER = "csv"  # in the run folder


class CSV(RunLogger, CSVLogger):  # type: ignore[misc]
    """The rows of metrics.jsonl as `csv/metrics.csv`, and the settings as `csv/hparams.yaml`.

    Pictures are in `samples/` of the run folder in any case.
    """

    title = "CSV"

    def __init__(self, run_dir: Path, clock: Clock, config: dict, resumed_from: int):
        RunLogger.__init__(self, run_dir, clock, config, resumed_from)
        CSVLogger.__init__(self, save_dir=str(run_dir), name="", version=FOLDER)

    def open(self) -> str:
        for name in ("metrics.csv", "hparams.yaml"):  # Lightning does not continue a file
            (Path(self.log_dir) / name).unlink(missing_ok=True)
        CSVLogger.log_hyperparams(self, self.config)
        for row in self.past():
            self.experiment.log_metrics(row, row["step"])
        self.experiment.save()
        return f"CSV: {self.experiment.metrics_file_path}"

    def write(self, row: Row, step: int) -> None:
        self.experiment.log_metrics(self.clock.row(row, step), step)  # every row has both x-axes
        self.experiment.save()
