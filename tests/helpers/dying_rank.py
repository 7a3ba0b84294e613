"""A callback by which one rank fails in the middle of a step, while the others wait for it."""

import os
import signal
import time

from lightning.pytorch.callbacks import Callback


class DyingRank(Callback):
    """Rank 1 raises, is killed, or falls silent, when `step` steps have been made."""

    def __init__(self, how: str, step: int = 3):
        self.how = how
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            if self.how == "raise":
                raise ArithmeticError("the fault that a test asked for")
            if self.how == "silent":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
