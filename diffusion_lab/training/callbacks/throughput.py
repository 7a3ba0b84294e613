"""Logs the loss, gradient norm, learning rates and speed of training."""

import statistics

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_lab.training.callbacks.periodic import stepped
from diffusion_lab.training.module import OBSERVED

# checkpoint keys
OPEN_WINDOW = "losses_since_the_last_row"
NORMS = "gradient_norms_since_the_last_row"


class Throughput(Callback):
    """Logs a row every `log_every_n_steps` steps, over all ranks and the steps since the last row.

    The loss and the gradient's norm, before clipping, are means over the steps that were not
    skipped, including those before a resume; the largest norm is logged, too. Images/s is by the
    run's clock, which grids and evaluation stop, without validation. The other values that a
    module's training_step returns are logged for the last step, on rank 0. Values in the context's
    `row`, which earlier callbacks put there, become part of the row.
    """

    phase = 1  # once others have put their values into the row

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []  # loss of each step since the last row
        self._loss = torch.zeros(())  # sum over this step's micro-batches
        self._norms: list[float] = []  # gradient norm of each step since the last row
        self._rates: list[float] = []  # of each group of parameters
        self._start = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        # only now is the module on its training device
        self._losses = [loss.to(pl_module.device) for loss in self._losses]
        self._open_window(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_validation_start(self, trainer, pl_module) -> None:
        self._start -= pl_module.context.clock.seconds()

    def on_validation_end(self, trainer, pl_module) -> None:
        self._start += pl_module.context.clock.seconds()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[OPEN_WINDOW] = self._reduced(trainer).cpu()
        checkpoint[NORMS] = list(self._norms)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if OPEN_WINDOW not in checkpoint:  # the run was without this callback before
            return
        self._losses = list(checkpoint[OPEN_WINDOW])
        self._norms = list(checkpoint[NORMS])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._loss = self._loss + outputs["loss"].detach()  # a micro-batch's share of the mean
        if not stepped(trainer, batch_idx):
            return
        if not pl_module.bad_steps.skipped:
            self._losses.append(self._loss)
            self._norms.append(pl_module.gradient_norm)
        self._loss = torch.zeros(())
        self._steps += 1
        if trainer.global_step % trainer.log_every_n_steps:
            return
        means = self._means(trainer)
        # a GPU has caught up by now, as item() waits for it
        seconds = pl_module.context.clock.seconds() - self._start
        parts = {k: float(each) for k, each in outputs.items() if k not in ("loss", OBSERVED)}
        speed = {"train/images_per_second": self._steps * pl_module.batch_size / seconds}
        pl_module.record(parts | means | named_rates(self._rates) | speed | pl_module.context.row)
        pl_module.context.row.clear()
        self._losses.clear()
        self._norms.clear()
        self._open_window(pl_module)

    def _means(self, trainer: lightning.Trainer) -> dict[str, float]:
        """The loss and the gradient norms since the last row; nothing if all steps were skipped."""
        losses, norms = self._reduced(trainer), self._norms
        means = {"train/loss": losses.mean().item()} if len(losses) else {}
        if norms:
            means |= {"train/grad_norm": statistics.fmean(norms), "train/grad_norm_max": max(norms)}
        return means

    def _reduced(self, trainer: lightning.Trainer) -> torch.Tensor:
        """The loss of each step since the last row, averaged over all ranks, (steps,)."""
        if not self._losses:
            return torch.empty(0)
        return trainer.strategy.reduce(torch.stack(self._losses), reduce_op="mean")

    def _open_window(self, pl_module) -> None:
        self._steps = 0
        self._start = pl_module.context.clock.seconds()


def named_rates(rates: list[float]) -> dict[str, float]:
    """The learning rates of groups of parameters by name; the first group's is train/lr."""
    return {f"train/lr_group{i}" if i else "train/lr": rate for i, rate in enumerate(rates)}
