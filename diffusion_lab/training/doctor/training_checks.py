"""What of a run's length, batch, rates and averages does not fit together."""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from diffusion_lab.backbone.macs import Cost
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.device import has_fast_bf16
from diffusion_lab.data import ImageDataModule
from diffusion_lab.training.callbacks import EMA
from diffusion_lab.training.diffusion_task import DiffusionTask
from diffusion_lab.training.doctor.finding import ADVICE, WARNING, Remark
from diffusion_lab.training.doctor.stages import Length

# Copies appear after a number of passes that hardly depends on how many images there are
# (arXiv:2505.16959); at CIFAR-10's 50,000 images EDM passes 4,000 times without them.
FEW_IMAGES, MANY_EPOCHS = 10_000, 200
AVERAGE_SHARE = 0.25  # of a run; a longer half-life still holds much of the initial weights
WARM_UP_SHARE, LONG_WARM_UP_SHARE = 0.1, 0.5  # of a run
LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e-2  # of Adam, two orders around the usual 1e-4 to 1e-3
FEW_VALIDATIONS = 2  # with one there is no curve


def batch(batch: BatchLayout, data: ImageDataModule) -> Iterator[Remark]:
    """A step that does not see an image twice."""
    size, images = batch.batch_size, len(data.train_images())
    if size > images:
        yield (
            WARNING,
            f"batch_size={size} is more than the {images} images trained on, so that a step sees "
            f"some twice; write batch_size={2 ** (images.bit_length() - 1)} or less",
        )


def epochs(cfg: DictConfig, data: ImageDataModule, length: Length) -> Iterator[Remark]:
    """Every image seen once at least."""
    images = len(data.train_images())
    if length.images_seen < images:
        limited = length.steps < cfg.trainer.max_steps
        steps = -(-images // cfg.batch_size)
        longer = "a longer trainer.max_time" if limited else f"trainer.max_steps={steps} or more"
        yield (
            ADVICE,
            f"the run sees {length.images_seen} images{' in its time here' if limited else ''}, "
            f"not even once each of {images}; write {longer}",
        )


def memorization(
    task: DiffusionTask, data: ImageDataModule, length: Length, cost: Cost
) -> Iterator[Remark]:
    """Few images seen so often that the model can learn them by heart."""
    images = len(data.train_images())
    passes = length.images_seen / images
    if images >= FEW_IMAGES or passes < MANY_EPOCHS:
        return
    millions = cost.params / 1e6
    augmented = task.module.augmentation is not None
    remedy = (
        ""
        if augmented
        else "write augmentation=non_leaky or fewer trainer.max_steps, watch val/loss, and "
    )
    yield (
        ADVICE if augmented else WARNING,
        f"a network of {millions:.1f}M parameters sees {images} images {passes:,.0f} times "
        f"each and may copy them; {remedy}look afterwards with "
        "`diffusion-lab memorization run=...`",
    )


def weight_averaging(task: DiffusionTask, length: Length) -> Iterator[Remark]:
    """An average that has forgotten the initial weights."""
    average = next((c for c in task.callbacks if isinstance(c, EMA)), None)
    if average is None:
        yield (
            ADVICE,
            "weights are not averaged, which costs samples much of their quality; leave out "
            "callbacks.weight_averaging=null",
        )
        return
    half_life, seen = float(average.half_life_images), length.images_seen
    if average.ramp is not None:
        half_life = min(half_life, average.ramp * seen)
    if half_life > AVERAGE_SHARE * seen:
        yield (
            WARNING,
            f"the average of weights has a half-life of {half_life:,.0f} images, and the run sees "
            f"{seen:,}, so that samples come from weights near the initial ones; write "
            "callbacks.weight_averaging.ramp=0.05",
        )


def warm_up(task: DiffusionTask, length: Length) -> Iterator[Remark]:
    """A learning rate that is reached early."""
    warm_up = getattr(task.module.lr_schedule, "warmup_images", 0)
    share = warm_up / length.images_seen
    if share > WARM_UP_SHARE:
        long = share > LONG_WARM_UP_SHARE
        much = "the whole run and more" if share > 1 else f"{share:.0%} of the run"
        yield (
            WARNING if long else ADVICE,
            f"the learning rate warms up over {warm_up:,} images, {much}; write "
            f"lr_schedule.warmup_images={int(length.images_seen * WARM_UP_SHARE / 4)}",
        )


def learning_rate(task: DiffusionTask) -> Iterator[Remark]:
    """A rate that is usual for Adam."""
    module = task.module
    (group, *_) = module.optimizer(module.trained_parameters()).param_groups
    rate = group["lr"]
    if "betas" in group and not LOWEST_RATE <= rate <= HIGHEST_RATE:
        what = "learns next to nothing" if rate < LOWEST_RATE else "usually diverges"
        yield WARNING, f"optimizer.lr={rate:g} {what}; write optimizer.lr=3e-4"


def precision(precision: str, device: torch.device) -> Iterator[Remark]:
    """A precision that neither overflows nor is emulated."""
    if precision == "16-mixed":
        yield (
            WARNING,
            "trainer.precision=16-mixed overflows above 65504, and `sample` and `evaluate` do not "
            "take it; write trainer.precision=auto, which is bf16-mixed where that is fast",
        )
    elif precision == "bf16-mixed" and not has_fast_bf16(device):
        yield (
            ADVICE,
            f"this {device.type} only emulates bf16, slower than float32; write "
            "trainer.precision=auto",
        )


def validation(cfg: DictConfig, length: Length) -> Iterator[Remark]:
    """A held-out loss with a curve, which shows overfitting."""
    every, steps = cfg.validate_every_n_steps, length.steps
    if steps // every < FEW_VALIDATIONS and steps >= FEW_VALIDATIONS:
        yield (
            ADVICE,
            f"the held-out loss is measured every {every} steps of {steps}, too seldom for a "
            f"curve; write validate_every_n_steps={max(1, steps // 10)}",
        )


CHECKS = (
    batch,
    epochs,
    memorization,
    weight_averaging,
    warm_up,
    learning_rate,
    precision,
    validation,
)
