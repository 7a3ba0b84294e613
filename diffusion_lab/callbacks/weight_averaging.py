"""Averaged weights: an exponential moving average whose length is given in images."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Moving average with a half-life in images, so that no batch size changes its length.

    Early on the half-life is `ramp` times the images seen, so that the initial weights are
    forgotten; `ramp: null` switches this off. (As in EDM, arXiv:2206.00364.)
    """

    def __init__(self, half_life_images: int = 500_000, ramp: float | None = 0.05):
        if half_life_images <= 0:
            raise ValueError(
                "callbacks.weight_averaging.half_life_images must be above 0; "
                "to train without an average write callbacks.weight_averaging=null"
            )
        # buffers are constants here, and integer ones cannot be averaged
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.half_life_images = half_life_images
        self.ramp = ramp
        self.decay = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.skipped:  # nothing to average
            self._latest_update_step = trainer.global_step
            return
        half_life = self.half_life_images
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * pl_module.images_seen)
        self.decay = 0.5 ** (pl_module.batch_size / half_life) if half_life else 0.0
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        torch._foreach_lerp_(averaged, current, 1 - self.decay)

    @contextmanager
    def swapped(self, module: lightning.LightningModule) -> Iterator[None]:
        """The module carries the averaged weights inside this block."""
        self._swap_models(module)
        try:
            yield
        finally:
            self._swap_models(module)


@contextmanager
def averaged_weights(trainer: lightning.Trainer) -> Iterator[None]:
    """The trained module has its averaged weights, if any, and eval mode inside this block."""
    module = trainer.lightning_module
    training = module.training
    module.eval()
    average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
    try:
        if average is None:
            yield
        else:
            with average.swapped(module):
                yield
    finally:
        module.train(training)
