"""Checkpoints of a run: `last.ckpt`, written whole or not at all."""

import os
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffusion_lab.callbacks.periodic import Periodic
from diffusion_lab.logger import JSONLines


class Checkpoint(Periodic):
    """Writes `last.ckpt` every `every_n_steps` steps and when training ends or is stopped."""

    def __init__(self, folder: Path, every_n_steps: int | None = 1000):
        self.path = folder / "last.ckpt"
        self.every_n_steps = every_n_steps

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        # not on_train_end: by then the averaged weights have replaced the trained ones
        self.run(trainer)

    def run(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.path)


class Resumption(Callback):
    """Drops the rows of metrics.jsonl that a run resumed at an earlier step writes again."""

    def __init__(self, rows: JSONLines):
        self.rows = rows

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        self.rows.continue_from(trainer.global_step)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill never leaves half a checkpoint.

    Lightning's own way is a temporary file in $TMPDIR that is moved; across file systems the move
    is a copy, and a kill within it destroys the checkpoint that was there.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
