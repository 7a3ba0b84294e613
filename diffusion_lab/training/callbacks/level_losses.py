"""Logs the training loss by noise level."""

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.training.callbacks.periodic import Checked, require_diffusion, stepped
from diffusion_lab.training.module import OBSERVED, TrainedModule

LEVELS = 10  # losses are reported by level: at t = 0.05, 0.15, ..., 0.95
OPEN_WINDOW = "losses_by_level_since_the_last_row"  # checkpoint key


class LevelLosses(Callback, Checked):
    """Adds `train_by_level/*` to each row of Throughput: the mean loss in each tenth of t.

    It covers what `train/loss` does: all ranks, and the steps since the last row that were not
    skipped. Losses are those of training, without importance weights and learned uncertainty.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(LEVELS, 2)  # sum and number of the losses since the last row
        self._step = torch.zeros(LEVELS, 2)  # those of this step's micro-batches

    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        require_diffusion(module, "callbacks.level_losses")

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        # only now is the module on its training device
        self._sums = self._sums.to(pl_module.device)
        self._step = torch.zeros_like(self._sums)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        t, losses = outputs[OBSERVED]
        self._step += sums_by_level(bins_of(t).to(losses.device), losses)
        if not stepped(trainer, batch_idx):
            return
        self._sums += self._step.masked_fill(pl_module.bad_steps.bad, 0)
        self._step = torch.zeros_like(self._sums)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            means = means_by_level("train", self._reduced(trainer).cpu())  # waits for a GPU once
            pl_module.context.row |= {name: float(mean) for name, mean in means.items()}
            self._sums = torch.zeros_like(self._sums)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[OPEN_WINDOW] = self._reduced(trainer).cpu()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if OPEN_WINDOW not in checkpoint:  # the run was without this callback before
            return
        if trainer.is_global_zero:  # the sums of all ranks, so one rank takes them
            self._sums = checkpoint[OPEN_WINDOW].clone()

    def _reduced(self, trainer: lightning.Trainer) -> Tensor:
        """The sums over all ranks, (LEVELS, 2)."""
        return trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")


def bins_of(t: Tensor) -> Tensor:
    """The tenth of (0, 1] that each t (B,) is in: 0 for t in (0, 0.1], and so on, (B,) int64."""
    return (t * LEVELS).ceil().long().sub(1).clamp(0, LEVELS - 1)


def sums_by_level(bins: Tensor, losses: Tensor) -> Tensor:
    """The sum and the number of losses (B,) in each of the LEVELS bins (B,), (LEVELS, 2)."""
    sums = torch.zeros(LEVELS, 2, device=losses.device)
    return sums.index_add_(0, bins, torch.stack([losses, torch.ones_like(losses)], 1))


def means_by_level(split: str, sums: Tensor) -> dict[str, Tensor | float]:
    """The mean loss at each level that has any, by name, from `sums_by_level` (LEVELS, 2)."""
    total, count = sums.unbind(1)
    return {
        f"{split}_by_level/t{(index + 0.5) / LEVELS:.2f}": total[index] / count[index]
        for index in count.nonzero().flatten().tolist()
    }
