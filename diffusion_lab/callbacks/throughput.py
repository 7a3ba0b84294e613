"""Training speed and learning rate."""

import time

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_lab.callbacks.periodic import stepped


class Throughput(Callback):
    """Logs images/s over all ranks since the last row, evaluation excluded, and the rate."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps = 0
        self._started = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module, outputs, batch, batch_idx
    ) -> None:
        step_done = stepped(trainer, batch_idx)
        due = step_done and trainer.global_step % trainer.log_every_n_steps == 0
        if due and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # kernels run behind the clock; once a row costs nothing
        self._seconds += time.perf_counter() - self._started
        self._steps += step_done
        if due:
            metrics = {
                "train/images_per_second": self._steps * pl_module.batch_size / self._seconds,
                "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            self._seconds, self._steps = 0.0, 0
