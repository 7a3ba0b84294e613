"""The context that a run's callbacks share: `trainer.lightning_module.context`."""

from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from diffusion_lab.common.messages import UserError
from diffusion_lab.compute.device import PeakMemory
from diffusion_lab.metrics.generative import PreparedMetrics
from diffusion_lab.pipeline import Generator, Pipeline
from diffusion_lab.training.logger.run_logger import Clock, JSONLines


@dataclass
class RunContext:
    """The objects that a run's callbacks use, set before training, and the results they leave.

    A callback is constructed from its settings alone, and reads everything else here in its hooks.
    """

    folder: Path
    clock: Clock
    memory: PeakMemory
    rows: JSONLines
    prepared_metrics: PreparedMetrics | None = None  # None: nothing is evaluated
    pipeline: Generator | None = None  # None: the run draws no samples

    results: dict[str, float] = field(default_factory=dict)  # metrics of the latest evaluation
    measured_at: int | None = None  # the step of `results`
    measured_by: Callback | None = None  # the callback that made `results`
    # metrics of the final weights by other numbers of sampling steps
    at_other_steps: dict[int, dict[str, float]] = field(default_factory=dict)
    latest_grid: Path | None = None
    row: dict[str, float] = field(default_factory=dict)  # more values of Throughput's next row
    summary: dict[str, object] = field(default_factory=dict)  # more entries of summary.json

    def measuring(self) -> PreparedMetrics:
        """The metrics, for a callback that evaluates."""
        if self.prepared_metrics is None:
            raise UserError("this run has no metrics to evaluate with")
        return self.prepared_metrics

    def sampling(self) -> Generator:
        """The pipeline, for a callback that draws samples."""
        if self.pipeline is None:
            raise UserError("this run trains an autoencoder, so its callbacks draw no samples")
        return self.pipeline

    def denoising(self) -> Pipeline:
        """The pipeline, for a callback that looks at denoising."""
        pipeline = self.sampling()
        if not isinstance(pipeline, Pipeline):
            raise UserError("this run trains no diffusion model, so there is no denoising to see")
        return pipeline
