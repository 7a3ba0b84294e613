"""Causes faults on purpose: a kill at a step, and a full disk."""

import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffusion_lab.families.diffusion.module import DiffusionModule


class Killed(BaseException):
    """An exception that stands for a kill: no handler of a run catches it."""


def die() -> None:
    """Ends a run as kill -9 would."""
    raise Killed


def infinite(loss):
    """An infinite loss whose gradient is finite."""
    return loss + math.inf


def nan(loss):
    """A loss that is no number."""
    return loss * math.nan


def steep(loss):
    """A finite loss whose gradient is infinite."""
    return loss + (loss - loss.detach()).sqrt()


def spoil_loss(patch, steps, spoil, module=DiffusionModule):
    """Replaces the loss of the first micro-batch of these steps, from 1, by `spoil` of it."""
    original = module.training_step

    def training_step(self, batch, batch_idx):
        result = original(self, batch, batch_idx)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if not (first and self.trainer.global_step + 1 in steps):
            return result
        if isinstance(result, dict):
            return result | {"loss": spoil(result["loss"])}
        return spoil(result)

    patch.setattr(module, "training_step", training_step)


def at_step(patch, step, act, module=DiffusionModule):
    """Calls `act` when training step `step` of a module, counted from 1, begins."""
    original = module.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step - 1:
            act()
        return original(self, batch, batch_idx)

    patch.setattr(module, "training_step", training_step)


def killed_within(act: Callable[[], None]) -> None:
    """Calls `act` in a fork of this process; `act` must end that process by SIGKILL."""
    if not (process := os.fork()):
        try:
            act()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Limits files of this process to `size` bytes in the block, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
