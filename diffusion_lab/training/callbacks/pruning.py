"""Ends hopeless runs of a search, by comparison with the other runs of their study."""

import math
import statistics
from pathlib import Path
from typing import Annotated

import lightning
from lightning.pytorch.callbacks import Callback

from diffusion_lab.common.files import read_rows
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Count, settings, whole
from diffusion_lab.metrics.quantity import higher_is_better
from diffusion_lab.runs.files import METRICS


@settings
class MedianPruning(Callback):
    """Stops a run whose best value is worse than the other runs' median at as many images.

    This is Optuna's MedianPruner on the metrics.jsonl files of the neighbouring run folders, so it
    needs only a shared disk. `metric` is measured by validation; lower is better but for what is
    known to be better if higher, such as val/psnr. A run that validated at other numbers of images
    (another batch size) counts with its last earlier value.
    The first `startup_runs` runs, and the first `startup_steps` steps of each, are never stopped.
    """

    metric: str = "val/loss"
    startup_runs: Count = 5
    startup_steps: Annotated[int, whole(0)] = 0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module) -> None:
        step = trainer.global_step
        if trainer.state.fn != "fit" or not self.startup_steps <= step < trainer.max_steps:
            return
        images, folder = pl_module.images_seen, pl_module.context.folder
        hopeless = trainer.is_global_zero and self.hopeless(folder, images)
        if trainer.strategy.reduce_boolean_decision(hopeless, all=False):
            pl_module.context.summary["pruned"] = True
            trainer.should_stop = True

    def hopeless(self, folder: Path, images: int) -> bool:
        """Whether a run's best value within `images` is worse than the other runs' median there."""
        own = [value for at, value in self.values(folder).items() if at <= images]
        if not own:
            raise UserError(
                f"callbacks.pruning.metric={self.metric} is not measured by validations; write "
                "callbacks.pruning.metric=val/loss"
            )
        folders = (path.parent for path in folder.parent.glob(f"*/{METRICS}"))
        others = [self.values(each) for each in folders if each != folder]
        there = [
            values[max(at for at in values if at <= images)]
            for values in others
            if values and min(values) <= images <= max(values)
        ]
        if len(there) < self.startup_runs:
            return False
        best, median = min(own), statistics.median(there)
        if best <= median:
            return False
        say(
            f"Pruned after {images:,} images: {self.metric} {self.sign * best:.4g} is worse than "
            f"the median of {len(there)} other runs, {self.sign * median:.4g}"
        )
        return True

    @property
    def sign(self) -> int:
        """-1 if higher values of `metric` are better, else 1."""
        return -1 if higher_is_better(self.metric) else 1

    def values(self, folder: Path) -> dict[int, float]:
        """The values of `metric`, with its sign, in a run folder by training images seen."""
        rows = read_rows(folder / METRICS)
        return {  # what is not finite is worse than anything
            row["images"]: self.sign * row[self.metric]
            if math.isfinite(row[self.metric])
            else math.inf
            for row in rows
            if {"images", self.metric} <= {*row}
        }
