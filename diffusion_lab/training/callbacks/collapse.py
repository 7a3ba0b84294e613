"""Ends the training of a GAN whose samples have become alike, from which it does not recover."""

import json
import math
from typing import Annotated

from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.messages import TrainingStopped, UserError
from diffusion_lab.common.ranges import Count, inside, settings
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.distributed import of_all_ranks, on_rank_zero
from diffusion_lab.training.callbacks.checked import Checked
from diffusion_lab.training.callbacks.periodic import stepped
from diffusion_lab.training.module import TrainedModule, module_of

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
