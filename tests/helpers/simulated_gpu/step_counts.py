"""A callback that writes what one ordinary step of a run costs on a simulated GPU."""

import math
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from diffusion_lab.training.callbacks import throughput
from helpers.simulated_gpu import counts

STEP = 4  # whose costs are those of all later steps: the optimiser has its state


class StepCounts(Callback):
    """Writes the operations, collectives and waits of a step to a file of each rank.

    The step lasts from the start of its first micro-batch to the start of the next step's.
    """

    def __init__(self, file: str):
        throughput.SECONDS_BETWEEN_LINES = math.inf  # a line of progress reads the loss
        self.file = file
        self.last = -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.last:
            return  # another micro-batch
        self.last = trainer.global_step
        if self.last == STEP + 1:
            lines = [f"{counts.kernels()} operations, {counts.collectives()} collectives"]
            lines += [f"{times} x {wait}" for wait, times in sorted(counts.waits.items())]
            Path(f"{self.file}{trainer.global_rank}").write_text("\n".join(lines))
        counts.reset()
