"""Checks that a run's length, batch, learning rate, averaging and metrics fit together."""

from collections.abc import Iterable, Iterator

from diffusion_lab.compute.device import has_fast_bf16
from diffusion_lab.training.callbacks import EMA
from diffusion_lab.training.doctor.finding import Remark, advice, warning
from diffusion_lab.training.doctor.planned_run import PlannedRun

# Copies appear after a number of passes that hardly depends on how many images there are
# (arXiv:2505.16959); at CIFAR-10's 50,000 images EDM passes 4,000 times without them.
FEW_IMAGES, MANY_EPOCHS = 10_000, 200
AVERAGE_SHARE = 0.25  # share of a run; a longer half-life keeps much of the initial weights
WARM_UP_SHARE, LONG_WARM_UP_SHARE = 0.1, 0.5  # shares of a run
LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e-2  # limits for Adam, wide around the usual 1e-4 to 1e-3
FEW_VALIDATIONS = 2  # with one there is no curve
MOST_SAMPLES = 50_000  # the literature's count
FEW_PER_CLASS = 100  # samples, below which a class's FID is mostly bias


def batch(run: PlannedRun) -> Iterator[Remark]:
    """Checks that a step does not see an image twice."""
    size, images = run.batch.batch_size, len(run.data.train_labels())
    if size > images:
        yield warning(
            f"batch_size={size} is more than the {images} training images, so a step sees some "
            f"twice; write batch_size={2 ** (images.bit_length() - 1)} or less"
        )


def epochs(run: PlannedRun) -> Iterator[Remark]:
    """Checks that every image is seen at least once."""
    images = len(run.data.train_labels())
    if run.images_seen < images:
        limited = run.steps < run.cfg.trainer.max_steps
        steps = -(-images // run.cfg.batch_size)
        longer = "a longer trainer.max_time" if limited else f"trainer.max_steps={steps} or more"
        yield advice(
            f"the run sees {run.images_seen} images{' in its time limit' if limited else ''}, "
            f"fewer than the {images} training images; write {longer}"
        )


def memorization(run: PlannedRun) -> Iterator[Remark]:
    """Looks for images so few and seen so often that the model can memorise them."""
    images = len(run.data.train_labels())
    passes = run.images_seen / images
    if images >= FEW_IMAGES or passes < MANY_EPOCHS:
        return
    augmented = run.task.module.augmentation is not None
    remedy = (
        ""
        if augmented
        else "write augmentation=non_leaky or fewer trainer.max_steps, watch val/loss, and "
    )
    yield (advice if augmented else warning)(
        f"a network of {run.cost.params / 1e6:.1f}M parameters sees {images} images "
        f"{passes:,.0f} times each and may copy them; {remedy}check the result with "
        "`diffusion-lab memorization run=...`"
    )


def weight_averaging(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the average of the weights forgets the initial ones."""
    average = run.task.callback(EMA)
    if average is None:
        yield advice(
            "weights are not averaged, which makes samples much worse; remove "
            "callbacks.weight_averaging=null"
        )
        return
    half_life, seen = float(average.half_life_images), run.images_seen
    if average.ramp is not None:
        half_life = min(half_life, average.ramp * seen)
    if half_life > AVERAGE_SHARE * seen:
        yield warning(
            f"the average of weights has a half-life of {half_life:,.0f} images, but the run sees "
            f"{seen:,}, so samples come from weights near the initial ones; write "
            "callbacks.weight_averaging.ramp=0.05"
        )


def warm_up(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the learning rate warms up early in the run."""
    warm_up = getattr(run.task.module.lr_schedule, "warmup_images", 0)
    share = warm_up / run.images_seen
    if share > WARM_UP_SHARE:
        long = share > LONG_WARM_UP_SHARE
        much = "the whole run and more" if share > 1 else f"{share:.0%} of the run"
        yield (warning if long else advice)(
            f"the learning rate warms up over {warm_up:,} images, {much}; write "
            f"lr_schedule.warmup_images={int(run.images_seen * WARM_UP_SHARE / 4)}"
        )


def learning_rate(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the learning rate is usual for Adam, or for what has its scale."""
    (group, *_) = run.task.module.optimizer().param_groups
    rate = group["lr"]
    adam = "betas" in group and group.get("adjust_lr_fn") != "original"
    if adam and not LOWEST_RATE <= rate <= HIGHEST_RATE:
        what = "learns next to nothing" if rate < LOWEST_RATE else "usually diverges"
        yield warning(f"optimizer.lr={rate:g} {what}; write optimizer.lr=3e-4")


def precision(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the precision neither overflows nor is emulated."""
    if run.precision == "16-mixed":
        yield warning(
            "trainer.precision=16-mixed overflows above 65504, and `sample` and `evaluate` do not "
            "support it; write trainer.precision=auto, which is bf16-mixed where that is fast"
        )
    elif run.precision == "bf16-mixed" and not has_fast_bf16(run.device):
        yield advice(
            f"this {run.device.type} only emulates bf16, which is slower than float32; write "
            "trainer.precision=auto"
        )


def validation(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the validation loss is measured often enough for a curve to show overfitting."""
    if not len(run.data.validation_labels()):
        yield advice(
            "no training images are kept for validation, so runs cannot be chosen by val/loss; "
            "write data.validation_size=auto"
        )
        return
    every, steps = run.cfg.validate_every_n_steps, run.steps
    if steps // every < FEW_VALIDATIONS and steps >= FEW_VALIDATIONS:
        yield advice(
            f"the validation loss is measured every {every} steps in a run of {steps}, too rarely "
            f"for a curve; write validate_every_n_steps={max(1, steps // 10)}"
        )


def evaluation(run: PlannedRun) -> Iterator[Remark]:
    """Checks that metrics are measured if the images allow it."""
    if run.task.metrics is None and run.datamodule.native_shape[0] in (1, 3):
        yield advice(
            "FID and KID are not measured; remove callbacks.evaluation=null, or run "
            "`diffusion-lab evaluate run=...` afterwards"
        )


def extractor(run: PlannedRun) -> Iterable[Remark]:
    """Loads the metrics' networks; reports them if they are missing or do not fit."""
    _ = run.metrics
    return ()


def sample_counts(run: PlannedRun) -> Iterator[Remark]:
    """Checks that there are enough images for FID, and equally many samples and real images."""
    metrics, data = run.task.metrics, run.data
    if metrics is None:
        return
    samples, width = metrics.num_samples, metrics.extractor.dim
    reference, test = len(metrics.reference_ids(data)), len(data.test_labels())
    if 0 < reference < width:
        yield warning(
            f"the reference has {reference} images for {width} features, so its covariance is "
            "singular; write metrics.reference_size=null, or use KID if the data have no more"
        )
    if samples <= width:
        yield advice(
            f"metrics.num_samples={samples} gives a singular covariance of {width} features, so "
            f"FID is mostly bias; use KID, or write metrics.num_samples={4 * width}"
        )
    if samples > MOST_SAMPLES:
        yield advice(
            f"metrics.num_samples={samples} is more than any published FID uses; write "
            f"metrics.num_samples={MOST_SAMPLES}"
        )
    if samples > test:
        yield advice(
            f"metrics.num_samples={samples} is more than the {test} test images, so the FID of "
            f"real images, measured on fewer, is too high to compare; write "
            f"metrics.num_samples={test}"
        )


def class_counts(run: PlannedRun) -> Iterator[Remark]:
    """Checks that there are enough samples of each class for its own FID."""
    metrics, classes = run.task.metrics, run.datamodule.num_classes
    if metrics is not None and metrics.per_class and metrics.num_samples < FEW_PER_CLASS * classes:
        yield warning(
            f"metrics.per_class=true compares {metrics.num_samples // classes} samples of each "
            f"class, too few for a FID; write metrics.num_samples={FEW_PER_CLASS * classes} or "
            "more"
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
    evaluation,
    extractor,
    sample_counts,
    class_counts,
)
