"""The LightningModule: any denoiser trained with any objective.

The stages of a training step in order, with the file of each:

    data/loader.py                       images (B, C, H, W) uint8 of step and rank, or moments
    training/module.py                   seeds for this step and rank; later backward and update
    first_stage/base.py                  x0 (B, c, h, w) float32 of about unit scale
    diffusion/objective/objective.py     the losses (B,): eps, dropped labels, weights, and in it
    diffusion/objective/time_sampler/      noise levels (B,) of a schedule, and importance (B,)
    diffusion/noise.py                     x = alpha x0 + sigma eps
    diffusion/denoiser.py                  output = network(x, level, labels)
    diffusion/objective/prediction.py      target = a x0 + b eps, with which output is compared

Some steps have more: an augmentation changes the images first (data/augmentation.py), a coupling
orders the noise (data/coupling.py), a layer is aligned (training/alignment.py), a bad step is
skipped (training/bad_steps.py), and a schedule sets the learning rate (training/lr_schedule.py).
After the step, callbacks average the weights (callbacks/weight_averaging.py) and write `train/loss`
to the loggers, as well as the loss by noise level (callbacks/throughput.py).
"""

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_lab.assembly.parameter_groups import inner_matrices
from diffusion_lab.backbone.base import ends_of, keeping_magnitude
from diffusion_lab.common.images import to_float
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.data import Batch
from diffusion_lab.data.augmentation import Augmentation
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective import BatchShare, Loss, Objective
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.training.alignment import LayerLoss
from diffusion_lab.training.callbacks.throughput import LEVELS, means_by_level, sums_by_level
from diffusion_lab.training.module import OBSERVED, Optimization, TrainedModule

VALIDATION_SEED = 0  # an image has the same noise in every run, whatever its seed


class DiffusionModule(TrainedModule):
    """Encodes images, trains on the loss of an `Objective`, validates and optimises."""

    shown = "loss"
    returns = frozenset({OBSERVED})

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        first_stage: FirstStage,
        optimization: Optimization,
        augmentation: Augmentation | None = None,
        alignment: LayerLoss | None = None,
    ):
        super().__init__(optimization)
        self.denoiser = denoiser
        self.objective = objective
        self.first_stage = first_stage
        self.augmentation = augmentation
        self.alignment = alignment

    @property
    def network(self) -> Denoiser:
        return self.denoiser

    def hidden_matrices(self) -> list[nn.Parameter]:
        backbone = self.denoiser.backbone
        return inner_matrices(backbone, ends_of(backbone))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Returns the mean loss, (), of b images, or of tensors made of images before training.

        With it come the times and losses of the images, (b,) each, as OBSERVED, and the parts of an
        alignment by the names that are logged.
        """
        share, shares = self.seed_share(batch_idx)
        clean = batch.clean(self.first_stage, self.augmentation)
        losses = self.objective(
            self.denoiser,
            clean.x0,
            Given(batch.labels, augmentation=clean.augmentation),
            share=BatchShare(share, shares, self.from_all_ranks),
            eps=clean.eps,
            images_seen=self.images_seen,
        )
        loss = losses.minimised.mean()
        parts = {"loss": loss}
        if self.alignment is not None:
            parts = self.aligned(loss, clean.x0 if clean.images is None else to_float(clean.images))
        return {**parts, OBSERVED: losses.observed}

    def aligned(self, loss: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The loss with that of a layer, and the values of both without it."""
        assert self.alignment is not None
        if not self.alignment.active(self.images_seen):
            return {"loss": loss + self.alignment(None)}
        value = self.alignment(images)
        parts = {"train/denoising_loss": loss.detach(), self.alignment.logged: value.detach()}
        return {"loss": loss + self.alignment.weight * self.alignment.loss(value), **parts}

    @cached_property
    def keeping_magnitude(self) -> list[Any]:
        """The modules that do so: walking over all of them takes a while at every step."""
        return keeping_magnitude(self.denoiser)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes a step, and puts weights back to the magnitude that the network keeps."""
        super().optimizer_step(*args, **kwargs)
        bad = self.bad_steps  # which must not change weights
        on_device = None if bad.bad.is_cpu else bad.bad
        if on_device is not None or not bad.skipped:
            for each in self.keeping_magnitude:
                each.renormalise(on_device)

    def from_all_ranks(self, values: Tensor) -> Tensor:
        """Gathers values (n,) from every rank, in rank order, (ranks x n,)."""
        if self.trainer.world_size == 1:
            return values
        every = [torch.empty_like(values) for _ in range(self.trainer.world_size)]
        dist.all_gather(every, values)  # Lightning's own prints deprecation warnings
        return torch.cat(every)

    def on_validation_epoch_start(self) -> None:
        # sum and count of the losses at each level
        self.level_sums = torch.zeros(LEVELS, 2, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Adds up the losses of validation or test images by level."""
        images, labels, ids = batch
        x0 = self.first_stage.encode(images)
        self.level_sums += losses_by_level(
            self.objective.loss, self.objective.schedule, self.denoiser, x0, labels, ids
        )

    def metrics_of_pass(self, split: str) -> dict[str, Tensor | float]:
        # reduced once and by hand: a rank whose share lacks a level must not wait for the others
        sums = self.trainer.strategy.reduce(self.level_sums, reduce_op="sum")
        total, count = sums.unbind(1)
        return {f"{split}/loss": total.sum() / count.sum(), **means_by_level(split, sums)}


def losses_by_level(
    loss: Loss, schedule: NoiseSchedule, denoiser: Denoiser, x0: Tensor, labels: Tensor, ids: Tensor
) -> Tensor:
    """The sum and the number of losses at each of LEVELS levels, (levels, 2).

    x0 (B, C, H, W) is clean, labels and ids are (B,). Image i is measured at level i mod 10, with
    its own noise, which is the same at every call.
    """
    eps = SampleNoise(VALIDATION_SEED, ids.tolist(), x0.device)(x0.shape[1:])
    bins = ids % LEVELS
    level = schedule((bins + 0.5) / LEVELS)
    losses = loss.measured(schedule, denoiser.prediction, denoiser, x0, eps, level, Given(labels))
    return sums_by_level(bins, losses)
