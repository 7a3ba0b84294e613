"""Loss, learning rate and speed of training."""

import time

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_lab.callbacks.periodic import Periodic, stepped


class Throughput(Callback):
    """A row every `log_every_n_steps` steps, over the steps since the last one and all ranks.

    The loss is the mean; images/s is by the wall clock, without validation, grids and evaluation.
    What else a module's training_step returns is that of the last step, on rank 0.
    """

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._rate = 0.0
        self._validating = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        self._open_window(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_validation_start(self, trainer, pl_module) -> None:
        self._validating -= time.perf_counter()

    def on_validation_end(self, trainer, pl_module) -> None:
        self._validating += time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module, outputs, batch, batch_idx
    ) -> None:
        self._losses.append(outputs["loss"].detach())
        if not stepped(trainer, batch_idx) or trainer.global_step % trainer.log_every_n_steps:
            return
        loss = trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
        loss = loss.item() * trainer.accumulate_grad_batches  # and here a GPU has caught up
        seconds = time.perf_counter() - self._start - (self._pauses(trainer) - self._paused)
        images = len(self._losses) // trainer.accumulate_grad_batches * pl_module.batch_size
        parts = {name: float(value) for name, value in outputs.items() if name != "loss"}
        metrics = parts | {
            "train/loss": loss,
            "train/lr": self._rate,
            "train/images_per_second": images / seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._open_window(trainer)

    def _open_window(self, trainer: lightning.Trainer) -> None:
        self._losses.clear()
        self._paused = self._pauses(trainer)
        self._start = time.perf_counter()

    def _pauses(self, trainer: lightning.Trainer) -> float:
        periodic = (c.seconds for c in trainer.callbacks if isinstance(c, Periodic))
        return self._validating + sum(periodic)
