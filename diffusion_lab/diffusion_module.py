"""The LightningModule: any denoiser trained with any objective."""

from collections.abc import Callable, Iterable

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_lab.augmentation import NonLeaky, augment
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.objective import Objective
from diffusion_lab.randomness import SampleNoise, mix_seed

VALIDATION_LEVELS = 10  # the held-out loss is reported at t = 0.05, 0.15, ..., 0.95
TRAINING = 0x747261696E  # keeps these draws apart from others of the same seed
VALIDATION_SEED = 0  # a held-out image has the same noise in every run, whatever its seed


class DiffusionModule(lightning.LightningModule):
    """Encode, loss, validate, optimise; the loss itself is `Objective`'s.

    `batch_size` is the global one: micro-batch x accumulation x ranks.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        first_stage: FirstStage,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[int, float], float],
        batch_size: int,
        seed: int = 0,
        augmentation: NonLeaky | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.objective = objective
        self.first_stage = first_stage
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.held_out_losses: dict[str, float] = {}
        self.validated_step = -1

    @property
    def images_seen(self) -> int:
        """Training images behind the current weights, over all ranks."""
        return self.trainer.global_step * self.batch_size

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes: the denoiser's parameters, and what the objective learns."""
        parameters = [*self.denoiser.parameters(), *self.objective.parameters()]
        return [parameter for parameter in parameters if parameter.requires_grad]

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1]: by steps or by its time limit."""
        trainer = self.trainer
        done = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
        for callback in trainer.callbacks:
            if isinstance(callback, lightning.pytorch.callbacks.Timer):
                elapsed = callback.time_elapsed("train")
                done = max(done, elapsed / (elapsed + (callback.time_remaining("train") or 0.0)))
                # clocks differ, and so would the learning rates
                done = trainer.strategy.broadcast(done)
        return min(1.0, done)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """batch: images (b, C, H, W) uint8 and labels (b,) int64 -> the mean loss, ()."""
        images, labels = batch
        trainer, accumulate = self.trainer, self.trainer.accumulate_grad_batches
        # A step's randomness (augmentation, levels, noise, dropout) is a function of the seed and
        # of the micro-batch's place in the run, so a resumed run draws what an unbroken one does.
        parts = accumulate * trainer.world_size
        part = batch_idx % accumulate * trainer.world_size + trainer.global_rank
        torch.manual_seed(mix_seed(self.seed, TRAINING, trainer.global_step * parts + part))
        images, augmentation = augment(self.augmentation, images)
        x0 = self.first_stage.encode(images)
        loss = self.objective(
            self.denoiser,
            x0,
            labels,
            part=part,
            parts=parts,
            gather=self.from_all_ranks,
            augmentation=augmentation,
        ).mean()
        self.log("train/loss", loss, prog_bar=True, logger=False)  # Throughput writes the rows
        return loss

    def from_all_ranks(self, values: Tensor) -> Tensor:
        """values (n,) of every rank, in rank order, (ranks x n,)."""
        if self.trainer.world_size == 1:
            return values
        every = [torch.empty_like(values) for _ in range(self.trainer.world_size)]
        dist.all_gather(every, values)  # Lightning's own prints what torch deprecates in it
        return torch.cat(every)

    def on_validation_epoch_start(self) -> None:
        # sum and count of the losses at each level
        self.held_out = torch.zeros(VALIDATION_LEVELS, 2, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Adds up the losses of held-out images by level."""
        images, labels, ids = batch
        x0 = self.first_stage.encode(images)
        self.held_out += losses_by_level(self.objective, self.denoiser, x0, labels, ids)

    def on_validation_epoch_end(self) -> None:
        # reduced once and by hand: a rank whose share lacks a level must not wait for the others
        total, count = self.trainer.strategy.reduce(self.held_out, reduce_op="sum").unbind(1)
        losses = {"val/loss": total.sum() / count.sum()}
        for index in count.nonzero().flatten().tolist():
            name = f"val_by_level/t{(index + 0.5) / VALIDATION_LEVELS:.2f}"
            losses[name] = total[index] / count[index]
        self.held_out_losses = {name: loss.item() for name, loss in losses.items()}
        self.validated_step = self.trainer.global_step
        self.log("val/loss", losses["val/loss"], prog_bar=True, logger=False)
        for logger in self.loggers:  # Lightning would label them with the step before
            logger.log_metrics(self.held_out_losses, step=self.validated_step)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient's norm over all parameters."""
        # Lightning's own refuses fused optimisers, for the sake of a gradient scaler; bf16 has none
        if gradient_clip_val and self.trainer.scaler is None:
            nn.utils.clip_grad_norm_(self.trained_parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> dict:
        """The optimiser, and a schedule in images seen rather than steps."""
        optimizer = self.optimizer(self.trained_parameters())
        schedule = LambdaLR(
            optimizer,
            # the first update uses the factor of the batch that it has seen
            lambda step: self.lr_schedule((step + 1) * self.batch_size, self.progress),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def losses_by_level(
    objective: Objective, denoiser: Denoiser, x0: Tensor, labels: Tensor, ids: Tensor
) -> Tensor:
    """The sum and the number of losses at each of VALIDATION_LEVELS levels, (levels, 2).

    Of clean x0 (B, C, H, W) with labels and ids (B,): image i at level i mod 10, with noise of its
    own, the same at every call.
    """
    eps = SampleNoise(VALIDATION_SEED, ids.tolist(), x0.device)(x0.shape[1:])
    bins = ids % VALIDATION_LEVELS
    level = objective.schedule((bins + 0.5) / VALIDATION_LEVELS)
    losses = objective.loss_at(denoiser, x0, eps, level, labels)
    sums = torch.zeros(VALIDATION_LEVELS, 2, device=losses.device)
    return sums.index_add_(0, bins, torch.stack([losses, torch.ones_like(losses)], 1))
