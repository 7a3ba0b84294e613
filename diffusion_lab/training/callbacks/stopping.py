"""Callbacks that end a run from which nothing is to be expected."""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated

import lightning
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from diffusion_lab.common.files import read_rows, write_atomically
from diffusion_lab.common.messages import TrainingStopped, UserError, say
from diffusion_lab.common.ranges import Count, inside, settings, whole
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.distributed import of_all_ranks, on_rank_zero
from diffusion_lab.metrics.quantity import higher_is_better
from diffusion_lab.runs.files import METRICS
from diffusion_lab.training.callbacks.periodic import Checked, stepped
from diffusion_lab.training.module import TrainedModule, module_of


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


FILE = "collapse.json"  # in the run folder
DIVERSITY = "train/diversity"  # how much samples of a label vary, relative to its images


@settings
class Collapse(Callback, Checked):
    """Ends a run whose samples of a label vary less than `least` times as much as its images.

    It looks whenever losses are logged, and ends the run after `patience` such looks in a row. A
    batch in which no two images have one label shows nothing, and is passed over.
    """

    least: Annotated[float, inside(0, 1)] = 0.05
    patience: Count = 20

    def __post_init__(self) -> None:
        self.row = 0  # looks in a row at samples that are alike

    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        if DIVERSITY not in module.returns:
            raise UserError("callbacks.collapse watches a GAN, and this run is none; leave it out")

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.row = state["row"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        due = trainer.global_step % trainer.log_every_n_steps == 0
        if not (due and stepped(trainer, batch_idx)) or pl_module.bad_steps.skipped:
            return
        every = of_all_ranks(outputs[DIVERSITY].item())
        found = [each for each in every if math.isfinite(each)]
        if not found:
            return
        mean = sum(found) / len(found)
        self.row = self.row + 1 if mean < self.least else 0
        if self.row >= self.patience:
            record = json.dumps({"step": trainer.global_step, DIVERSITY: mean})
            path = module_of(trainer).context.folder / FILE
            on_rank_zero(lambda: write_atomically(path, record))
            raise TrainingStopped(
                f"the generator's samples of a label are alike: up to step {trainer.global_step} "
                f"they vary {mean:.1%} as much as images; try a larger objective.gamma, or a lower "
                "optimizer.lr, in a new run",
                final=True,
            )
