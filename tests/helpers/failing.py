"""Callbacks that make a rank or a process fail in a run, data that die, and a wrong loss."""

import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from diffusion_lab.common.messages import say
from diffusion_lab.data import ImageBatch, ImageDataModule
from diffusion_lab.diffusion.objective import Denoising


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


class KilledService(Callback):
    """Kills W&B's process before the third step, if this process has started it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            mine = ["pgrep", "-P", str(os.getpid()), "wandb"]
            found = subprocess.run(mine, capture_output=True, text=True).stdout.split()
            for process in found:
                os.kill(int(process), signal.SIGKILL)
            say(f"killed {len(found)} service")


class Endless(Dataset):
    """Repeats the training images; image 60 kills the process that loads it."""

    def __init__(self, data):
        self.images, self.labels = data.train_images(), data.train_labels()

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        if index == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return ImageBatch(self.images[index % 64], self.labels[index % 64])


class DyingWorkers(ImageDataModule):
    """A data module that loses its one worker in the eighth batch, at a batch size of 8."""

    def train_dataloader(self):
        return DataLoader(Endless(self), self.micro_batch, num_workers=1, timeout=60)


class MeanLoss(Denoising):
    """A loss without a value for each image."""

    def measured(self, *parts):
        return super().measured(*parts).mean()
