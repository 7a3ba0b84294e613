"""Parts of callbacks: what is done every so many steps, and checked before a run."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import lightning
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import optional, whole
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.training.module import OBSERVED, TrainedModule, data_of, module_of


class Checked(ABC):
    """A part of a callback: the check of whether it fits a run."""

    @abstractmethod
    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        """Raises UserError if the callback does not fit; `trainer` holds the trainer's settings."""


def require_diffusion(module: TrainedModule, key: str) -> None:
    """Raises UserError, naming the callback's key, unless the run trains a diffusion model."""
    if OBSERVED not in module.returns:
        raise UserError(f"{key} needs a diffusion model, and this run trains none; leave it out")


Interval = Annotated[int | None, optional(whole(1))]  # in optimiser steps; None: never


def stepped(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch ended an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def validates(trainer: lightning.Trainer) -> bool:
    """Whether Lightning validates after the step that has just ended."""
    micro_batches = trainer.global_step * trainer.accumulate_grad_batches
    every = trainer.val_check_batch  # None: not by batch count
    return every is not None and micro_batches % every == 0 and trainer.enable_validation


def times(steps: int, every: int | None) -> int:
    """How often a run does what it does every `every` steps and once more at its end."""
    return 1 + ((steps - 1) // every if every else 0)


class Periodic(Callback, ABC):
    """Calls `run` every `every_n_steps` optimiser steps (null: never), except after the last one.

    If `at_end` is true, `run` is called once more at the end of a run, on the final weights.
    """

    at_end: ClassVar[bool] = False
    every_n_steps: int | None

    @abstractmethod
    def run(self, trainer: lightning.Trainer) -> None:
        """Does the callback's work, on every rank."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if stepped(trainer, batch_idx) and self.due(trainer):
            self.timed_run(trainer)

    def due(self, trainer: lightning.Trainer) -> bool:
        """Whether to run after the step that has just ended."""
        step = trainer.global_step
        if not self.every_n_steps or step == trainer.max_steps:
            return False
        return step % self.every_n_steps == 0

    def at_the_end(self, trainer: lightning.Trainer) -> None:
        """Runs on the final weights."""
        self.timed_run(trainer)

    def timed_run(self, trainer: lightning.Trainer) -> None:
        """Calls `run` without counting its time and memory as training."""
        context = module_of(trainer).context
        with context.clock.stopped(), context.memory.stopped():
            self.run(trainer)


class OneBatch(Callback):
    """Takes the images of the first step in every step; noise and levels are drawn anew.

    (Lightning's overfit_batches makes an epoch of each batch, and a run here is one epoch.)
    """

    def setup(self, trainer, pl_module, stage: str) -> None:
        data_of(trainer).repeats_batch = True
