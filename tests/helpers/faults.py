"""Faults on purpose: a kill at a step, and a disk that is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from diffusion_lab.training.diffusion_module import DiffusionModule


class Killed(BaseException):
    """Stands for a kill: nothing of the run's own gets to see it."""


def die() -> None:
    """As good as kill -9."""
    raise Killed


def at_step(patch, step, act):
    """Has `act` called when that step begins, the first being 1."""
    original = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step - 1:
            act()
        return original(self, batch, batch_idx)

    patch.setattr(DiffusionModule, "training_step", training_step)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
