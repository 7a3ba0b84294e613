"""A callback that makes the loss of only one rank infinite."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback


class BadRank(Callback):
    """Makes the loss on rank 1 infinite in the steps `steps`, counted from 1.

    The gradient stays finite. At the end each rank saves its weights in `folder`.
    """

    def __init__(self, folder: str, steps: list[int]):
        self.folder = Path(folder)
        self.steps = steps

    def on_fit_start(self, trainer, pl_module) -> None:
        original = pl_module.training_step

        def training_step(batch, batch_idx):
            bad = trainer.global_rank == 1 and trainer.global_step + 1 in self.steps
            result = original(batch, batch_idx)
            return result | {"loss": result["loss"] + (torch.inf if bad else 0.0)}

        pl_module.training_step = training_step

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.folder.mkdir(exist_ok=True)
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")
