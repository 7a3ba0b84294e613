"""A callback by which the loss of one rank alone is not finite."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback


class BadRank(Callback):
    """On rank 1 the loss of the steps in `steps`, the first being 1, is infinite.

    Its gradient is finite. At the end each rank leaves its weights in `folder`.
    """

    def __init__(self, folder: str, steps: list[int]):
        self.folder = Path(folder)
        self.steps = steps

    def on_fit_start(self, trainer, pl_module) -> None:
        original = pl_module.training_step

        def training_step(batch, batch_idx):
            bad = trainer.global_rank == 1 and trainer.global_step + 1 in self.steps
            return original(batch, batch_idx) + (torch.inf if bad else 0.0)

        pl_module.training_step = training_step

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.folder.mkdir(exist_ok=True)
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")
