"""Averaged weights: an exponential moving average whose length is given in images."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from diffusion_lab.common.ranges import above, optional, ranges
from diffusion_lab.compute.sharding import gathered, local, whole
from diffusion_lab.training.callbacks.periodic import stepped

TRAINED = "current_model_state"  # checkpoint key of Lightning's WeightAveraging


class EMA(Callback):
    """An exponential moving average of the weights; the batch size does not change its half-life.

    Early on the half-life is `ramp` times the images seen, so that the initial weights are
    forgotten; `ramp: null` switches this off. (As in EDM, arXiv:2206.00364.)
    A checkpoint's `state_dict` holds the averaged weights, `current_model_state` the trained ones,
    which `restore_trained` puts back once the average has been taken from the module.
    Validation uses the averaged weights, and the module holds them after training.
    (Lightning's WeightAveraging copies the whole module, and cannot copy a sharded one.)
    """

    @ranges(half_life_images=above(0), ramp=optional(above(0)))
    def __init__(self, half_life_images: int = 500_000, ramp: float | None = 0.05):
        self.half_life_images = half_life_images
        self.ramp = ramp
        self.decay = 0.0
        self._average: list[Tensor] = []  # average of this rank's share of each parameter
        self._latest_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        parameters = shares(pl_module)
        averages = self._average or [parameter.clone() for parameter in parameters]
        self._average = [a.to(p.device) for a, p in zip(averages, parameters, strict=True)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not stepped(trainer, batch_idx) or pl_module.bad_steps.skipped:
            return  # nothing new to average
        half_life = self.half_life_images
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * pl_module.images_seen)
        self.decay = 0.5 ** (pl_module.batch_size / half_life) if half_life else 0.0
        # the average begins with the weights after the first step
        weight = 1 - self.decay if self._latest_step else 1.0
        torch._foreach_lerp_(self._average, shares(pl_module), weight)
        self._latest_step = trainer.global_step

    def on_train_end(self, trainer, pl_module) -> None:
        torch._foreach_copy_(shares(pl_module), self._average)

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self._swap(pl_module)

    def state_dict(self) -> dict[str, int]:
        return {"latest_update_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._latest_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[TRAINED] = checkpoint["state_dict"]
        with self.swapped(pl_module):
            # cloned: the module's own would be swapped back before they are written
            averages = {
                name: whole(parameter).detach().clone()
                for name, parameter in pl_module.named_parameters()
            }
        checkpoint["state_dict"] = checkpoint["state_dict"] | averages

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if TRAINED in checkpoint:  # else the run had no average so far
            self._average = [parameter.clone() for parameter in shares(pl_module)]

    @contextmanager
    def swapped(self, module: lightning.LightningModule) -> Iterator[None]:
        """Puts the averaged weights into the module for this block."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def _swap(self, module: lightning.LightningModule) -> None:
        if self._average:  # empty before training
            parameters = shares(module)
            kept = [parameter.clone() for parameter in parameters]
            torch._foreach_copy_(parameters, self._average)
            torch._foreach_copy_(self._average, kept)


def restore_trained(trainer: lightning.Trainer, checkpoint: dict) -> None:
    """Loads a checkpoint's trained weights into the module, if it also holds averaged ones."""
    if TRAINED in checkpoint:
        trainer.strategy.load_model_state_dict({"state_dict": checkpoint[TRAINED]})


def shares(module: lightning.LightningModule) -> list[Tensor]:
    """Returns this rank's share of each parameter, as a view."""
    return [local(parameter) for parameter in module.parameters()]


@contextmanager
def averaged_weights(trainer: lightning.Trainer) -> Iterator[None]:
    """Puts the module into eval mode and its precision, with averaged weights if it has any."""
    module = trainer.lightning_module
    training = module.training
    module.eval()
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    average = next((c for c in callbacks if isinstance(c, EMA)), None)
    swapped = average.swapped(module) if average else nullcontext()
    try:
        with swapped, gathered(module), trainer.precision_plugin.forward_context():
            yield
    finally:
        module.train(training)
