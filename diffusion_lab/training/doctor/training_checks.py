"""What of a run's length, batch, rates and averages does not fit together."""

from collections.abc import Iterator

from diffusion_lab.compute.device import has_fast_bf16
from diffusion_lab.training.callbacks import EMA
from diffusion_lab.training.doctor.finding import ADVICE, WARNING, Remark, advice, warning
from diffusion_lab.training.doctor.planned_run import PlannedRun

# Copies appear after a number of passes that hardly depends on how many images there are
# (arXiv:2505.16959); at CIFAR-10's 50,000 images EDM passes 4,000 times without them.
FEW_IMAGES, MANY_EPOCHS = 10_000, 200
AVERAGE_SHARE = 0.25  # of a run; a longer half-life still holds much of the initial weights
WARM_UP_SHARE, LONG_WARM_UP_SHARE = 0.1, 0.5  # of a run
LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e-2  # of Adam, two orders around the usual 1e-4 to 1e-3
FEW_VALIDATIONS = 2  # with one there is no curve


def batch(run: PlannedRun) -> Iterator[Remark]:
    """A step that does not see an image twice."""
    size, images = run.batch.batch_size, len(run.data.train_images())
    if size > images:
        yield warning(
            f"batch_size={size} is more than the {images} images trained on, so that a step sees "
            f"some twice; write batch_size={2 ** (images.bit_length() - 1)} or less"
        )


def epochs(run: PlannedRun) -> Iterator[Remark]:
    """Every image seen once at least."""
    images = len(run.data.train_images())
    if run.images_seen < images:
        limited = run.steps < run.cfg.trainer.max_steps
        steps = -(-images // run.cfg.batch_size)
        longer = "a longer trainer.max_time" if limited else f"trainer.max_steps={steps} or more"
        yield advice(
            f"the run sees {run.images_seen} images{' in its time here' if limited else ''}, "
            f"not even once each of {images}; write {longer}"
        )


def memorization(run: PlannedRun) -> Iterator[Remark]:
    """Few images seen so often that the model can learn them by heart."""
    images = len(run.data.train_images())
    passes = run.images_seen / images
    if images >= FEW_IMAGES or passes < MANY_EPOCHS:
        return
    augmented = run.task.module.augmentation is not None
    remedy = (
        ""
        if augmented
        else "write augmentation=non_leaky or fewer trainer.max_steps, watch val/loss, and "
    )
    yield (
        ADVICE if augmented else WARNING,
        f"a network of {run.cost.params / 1e6:.1f}M parameters sees {images} images "
        f"{passes:,.0f} times each and may copy them; {remedy}look afterwards with "
        "`diffusion-lab memorization run=...`",
    )


def weight_averaging(run: PlannedRun) -> Iterator[Remark]:
    """An average that has forgotten the initial weights."""
    average = next((c for c in run.task.callbacks if isinstance(c, EMA)), None)
    if average is None:
        yield advice(
            "weights are not averaged, which costs samples much of their quality; leave out "
            "callbacks.weight_averaging=null"
        )
        return
    half_life, seen = float(average.half_life_images), run.images_seen
    if average.ramp is not None:
        half_life = min(half_life, average.ramp * seen)
    if half_life > AVERAGE_SHARE * seen:
        yield warning(
            f"the average of weights has a half-life of {half_life:,.0f} images, and the run sees "
            f"{seen:,}, so that samples come from weights near the initial ones; write "
            "callbacks.weight_averaging.ramp=0.05"
        )


def warm_up(run: PlannedRun) -> Iterator[Remark]:
    """A learning rate that is reached early."""
    warm_up = getattr(run.task.module.lr_schedule, "warmup_images", 0)
    share = warm_up / run.images_seen
    if share > WARM_UP_SHARE:
        long = share > LONG_WARM_UP_SHARE
        much = "the whole run and more" if share > 1 else f"{share:.0%} of the run"
        yield (
            WARNING if long else ADVICE,
            f"the learning rate warms up over {warm_up:,} images, {much}; write "
            f"lr_schedule.warmup_images={int(run.images_seen * WARM_UP_SHARE / 4)}",
        )


def learning_rate(run: PlannedRun) -> Iterator[Remark]:
    """A rate that is usual for Adam."""
    module = run.task.module
    (group, *_) = module.optimizer(module.trained_parameters()).param_groups
    rate = group["lr"]
    if "betas" in group and not LOWEST_RATE <= rate <= HIGHEST_RATE:
        what = "learns next to nothing" if rate < LOWEST_RATE else "usually diverges"
        yield warning(f"optimizer.lr={rate:g} {what}; write optimizer.lr=3e-4")


def precision(run: PlannedRun) -> Iterator[Remark]:
    """A precision that neither overflows nor is emulated."""
    if run.precision == "16-mixed":
        yield warning(
            "trainer.precision=16-mixed overflows above 65504, and `sample` and `evaluate` do not "
            "take it; write trainer.precision=auto, which is bf16-mixed where that is fast"
        )
    elif run.precision == "bf16-mixed" and not has_fast_bf16(run.device):
        yield advice(
            f"this {run.device.type} only emulates bf16, slower than float32; write "
            "trainer.precision=auto"
        )


def validation(run: PlannedRun) -> Iterator[Remark]:
    """A held-out loss with a curve, which shows overfitting."""
    every, steps = run.cfg.validate_every_n_steps, run.steps
    if steps // every < FEW_VALIDATIONS and steps >= FEW_VALIDATIONS:
        yield advice(
            f"the held-out loss is measured every {every} steps of {steps}, too seldom for a "
            f"curve; write validate_every_n_steps={max(1, steps // 10)}"
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
