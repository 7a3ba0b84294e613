"""A callback that makes one rank fail in the middle of a step while the others wait for it."""

import os
import signal
import time

from lightning.pytorch.callbacks import Callback


class DyingRank(Callback):
    """Makes rank 1 raise an error, be killed or fall silent after `step` steps."""

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
