"""Checks of doctor: parts of the model, the length of the run and its metrics fit together."""

import math
from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.assembly.costs import RunCost
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.device import has_fast_bf16
from diffusion_lab.data import ImageData
from diffusion_lab.estimate.checks_of_resources import Remark, advice, warning
from diffusion_lab.families.diffusion.task import DiffusionTask
from diffusion_lab.training.callbacks import EMA

# ratios of the data's standard deviation to the assumed one: at 1.25 a network's targets are off by
# half in variance, at 2 by a factor of four; an error in the inputs alone matters less
OFF, FAR_OFF = 1.25, 2.0
FAR_NOISE = 3.0  # largest noise over the largest distance; levels beyond it teach nothing
REMAINING_SIGNAL = 0.03  # alpha / sigma at t = 1: DDPM leaves 0.006, Stable Diffusion 0.068
FEWEST_TOKENS = 16  # a grid of 4 x 4, below which there is little to attend to
FEW_STEPS, MANY_STEPS = 5, 500  # sampler steps for a model that is not distilled
LARGE_SCALE = 5.0  # guidance scale above which pixels saturate
# Copies appear after a number of passes that hardly depends on how many images there are
# (arXiv:2505.16959); at CIFAR-10's 50,000 images EDM passes 4,000 times without them.
FEW_IMAGES, MANY_EPOCHS = 10_000, 200
AVERAGE_SHARE = 0.25  # share of a run; a longer half-life keeps much of the initial weights
WARM_UP_SHARE, LONG_WARM_UP_SHARE = 0.1, 0.5  # shares of a run
LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e-2  # limits for Adam, wide around the usual 1e-4 to 1e-3
FEW_VALIDATIONS = 2  # with one there is no curve
MOST_SAMPLES = 50_000  # the literature's count
FEW_PER_CLASS = 100  # samples, below which a class's FID is mostly bias


def data_std(task: DiffusionTask, clean: Tensor) -> Iterator[Remark]:
    """Compares the data's standard deviation with the one that scales the network's values."""
    module, std = task.module, float(clean.std())
    objective = module.objective
    assumed = {
        "denoiser.input_std": module.denoiser.input_std,
        "objective.prediction.data_std": objective.prediction.data_std,
        "objective.loss.weighting.data_std": getattr(objective.loss.weighting, "data_std", None),
    }
    wrong = {
        key: max(value / std, std / value)
        for key, value in assumed.items()
        if value is not None and std > 0
    }
    inputs_alone = list(wrong) == ["denoiser.input_std"]
    if max(wrong.values(), default=1) > (FAR_OFF if inputs_alone else OFF):
        key = max(wrong, key=lambda name: wrong[name])
        remedy = " ".join(f"{key}={std:.2f}" for key in wrong)
        yield (warning if wrong[key] > FAR_OFF else advice)(
            f"the data's standard deviation is {std:.2f}, but {key} is {assumed[key]:.2g}; "
            f"write {remedy}"
        )


def largest_noise(task: DiffusionTask, clean: Tensor) -> Iterator[Remark]:
    """Compares an exploding schedule's largest noise with the largest distance of two images."""
    # NCSNv2's technique 1 (arXiv:2006.09011); the distance in a sample is a little too small
    schedule = task.pipeline.schedule
    sigma = float(schedule(torch.ones(())).sigma)
    if not schedule.explodes:
        return
    images = clean.flatten(1).float()
    distance = float(torch.cdist(images, images).max())
    if distance > 0 and not 1 / OFF < sigma / distance < FAR_NOISE:
        few = sigma < distance
        why = (
            "samples start from noise that does not cover the data"
            if few
            else "the noisiest levels teach nothing"
        )
        yield (warning if few else advice)(
            f"schedule.sigma_max={sigma:.3g}, but the two sampled images that differ most are "
            f"{distance:.3g} apart: {why}; write schedule.sigma_max={math.ceil(distance)}"
        )


def schedule_end(task: DiffusionTask) -> Iterator[Remark]:
    """Checks that the schedule ends in pure noise, from which samples start."""
    schedule = task.pipeline.schedule
    end = schedule(torch.ones(()))
    left = float(end.alpha / end.sigma)
    if not schedule.explodes and left > REMAINING_SIGNAL:
        yield warning(
            f"the schedule's noisiest level still contains {left:.1%} of the image, but sampling "
            "starts from pure noise, so brightness tends to the mean; write "
            "schedule=zero_terminal_snr objective=v_prediction, or schedule=ddpm_linear"
        )


def combination(task: DiffusionTask) -> Iterator[Remark]:
    """Repeats the advice that training itself gives."""
    for line in task.advice():
        yield warning(line)


def tokens(cfg: DictConfig, task: DiffusionTask) -> Iterator[Remark]:
    """Checks that patches are neither too few to show detail nor too many to afford."""
    denoiser, own = task.module.denoiser, cfg.backbone
    _, height, width = denoiser.image_shape
    count = getattr(denoiser.backbone, "tokens", None)
    if count is None:
        return
    fitting = {  # number of tokens by patch size
        patch: height * width // patch**2
        for patch in range(1, min(height, width) + 1)
        if height % patch == width % patch == 0
    }
    finer = [patch for patch, n in fitting.items() if patch < own.patch and n >= FEWEST_TOKENS]
    if count < FEWEST_TOKENS and finer:
        yield warning(
            f"backbone.patch={own.patch} makes {count} patches of a {height}x{width} image, too "
            f"few to show detail; write backbone.patch={finer[-1]}"
        )
    # a block spends 2 N^2 D MACs on pairs of tokens, and 12 N D^2 in its layers
    limit = 6 * own.width
    coarser = [patch for patch, n in fitting.items() if patch > own.patch and n <= limit]
    if "heads" in own and count > limit and coarser:
        yield warning(
            f"{count} patches at width {own.width} cost more in attention than in all layers; "
            f"write backbone.patch={coarser[0]}, or backbone=unet"
        )


def labels(task: DiffusionTask) -> Iterator[Remark]:
    """Checks that labels carry information, and that dropping them serves guidance."""
    guidance, objective = task.pipeline.guidance, task.module.objective
    dropped, guided = objective.label_dropout, getattr(objective.loss, "guidance", 1) != 1
    if not task.module.denoiser.conditioning.conditional:
        return
    if task.datamodule.num_classes == 1:
        yield advice(
            "all images have the same label, which carries no information; write conditioning=none"
        )
    elif dropped > 0 and not (guidance.uses_weak or guidance.weak_run or guided):
        yield advice(
            f"objective.label_dropout={dropped} trains an unconditional model for "
            "guidance, but this run is evaluated without guidance; write guidance=classifier_free, "
            "or objective.label_dropout=0 if you will never use it"
        )


def sampling(task: DiffusionTask) -> Iterator[Remark]:
    """Checks that the sampler's steps and the guidance scale are in the range that works."""
    sampler, guidance = task.pipeline.sampler, task.pipeline.guidance
    adaptive = sampler.adaptive
    # of models for few steps: jumps, consistency models, and students with straight paths
    few = sampler.jumps or sampler.needs_consistency or task.teacher is not None
    if sampler.steps < FEW_STEPS and not (adaptive or few):
        yield warning(
            f"sampler.steps={sampler.steps} gives coarse samples, on which all metrics are "
            "measured; write sampler.steps=20"
        )
    if sampler.steps > MANY_STEPS and not adaptive:
        yield advice(
            f"sampler.steps={sampler.steps} makes every grid and evaluation slow, and "
            "sampler=dpm_solver sampler.steps=20 comes close; keep it to reproduce DDPM"
        )
    if guidance.uses_weak and guidance.scale > LARGE_SCALE:
        yield warning(
            f"guidance.scale={guidance.scale} saturates pixels and reduces variety; write "
            "guidance.scale=2, and try others afterwards with `diffusion-lab sample-sweep`"
        )


def batch(layout: BatchLayout, data: ImageData) -> Iterator[Remark]:
    """Checks that a step does not see an image twice."""
    size, images = layout.batch_size, len(data.train_labels())
    if size > images:
        yield warning(
            f"batch_size={size} is more than the {images} training images, so a step sees some "
            f"twice; write batch_size={2 ** (images.bit_length() - 1)} or less"
        )


def epochs(cfg: DictConfig, data: ImageData, steps: int, seen: int) -> Iterator[Remark]:
    """Checks that every image is seen at least once."""
    images = len(data.train_labels())
    if seen < images:
        limited, enough = steps < cfg.trainer.max_steps, -(-images // cfg.batch_size)
        longer = "a longer trainer.max_time" if limited else f"trainer.max_steps={enough} or more"
        yield advice(
            f"the run sees {seen} images{' in its time limit' if limited else ''}, "
            f"fewer than the {images} training images; write {longer}"
        )


def memorization(
    task: DiffusionTask, data: ImageData, counts: RunCost, seen: int
) -> Iterator[Remark]:
    """Looks for images so few and seen so often that the model can memorise them."""
    images = len(data.train_labels())
    passes = seen / images
    if images >= FEW_IMAGES or passes < MANY_EPOCHS:
        return
    augmented = task.module.augmentation is not None
    remedy = (
        ""
        if augmented
        else "write augmentation=non_leaky or fewer trainer.max_steps, watch val/loss, and "
    )
    yield (advice if augmented else warning)(
        f"a network of {counts.parameters / 1e6:.1f}M parameters sees {images} images "
        f"{passes:,.0f} times each and may copy them; {remedy}check the result with "
        "`diffusion-lab memorization run=...`"
    )


def weight_averaging(task: DiffusionTask, seen: int) -> Iterator[Remark]:
    """Checks that the average of the weights forgets the initial ones."""
    average = task.callback(EMA)
    if average is None:
        yield advice(
            "weights are not averaged, which makes samples much worse; remove "
            "callbacks.weight_averaging=null"
        )
        return
    half_life = float(average.half_life_images)
    if average.ramp is not None:
        half_life = min(half_life, average.ramp * seen)
    if half_life > AVERAGE_SHARE * seen:
        yield warning(
            f"the average of weights has a half-life of {half_life:,.0f} images, but the run sees "
            f"{seen:,}, so samples come from weights near the initial ones; write "
            "callbacks.weight_averaging.ramp=0.05"
        )


def warm_up(task: DiffusionTask, seen: int) -> Iterator[Remark]:
    """Checks that the learning rate warms up early in the run."""
    warm_up = getattr(task.module.lr_schedule, "warmup_images", 0)
    share = warm_up / seen
    if share > WARM_UP_SHARE:
        long = share > LONG_WARM_UP_SHARE
        much = "the whole run and more" if share > 1 else f"{share:.0%} of the run"
        yield (warning if long else advice)(
            f"the learning rate warms up over {warm_up:,} images, {much}; write "
            f"lr_schedule.warmup_images={int(seen * WARM_UP_SHARE / 4)}"
        )


def learning_rate(task: DiffusionTask) -> Iterator[Remark]:
    """Checks that the learning rate is usual for Adam, or for what has its scale."""
    (group, *_) = task.module.optimizer().param_groups
    rate = group["lr"]
    adam = "betas" in group and group.get("adjust_lr_fn") != "original"
    if adam and not LOWEST_RATE <= rate <= HIGHEST_RATE:
        what = "learns next to nothing" if rate < LOWEST_RATE else "usually diverges"
        yield warning(f"optimizer.lr={rate:g} {what}; write optimizer.lr=3e-4")


def precision(precision: str, device: torch.device) -> Iterator[Remark]:
    """Checks that the precision neither overflows nor is emulated."""
    if precision == "16-mixed":
        yield warning(
            "trainer.precision=16-mixed overflows above 65504, and `sample` and `evaluate` do not "
            "support it; write trainer.precision=auto, which is bf16-mixed where that is fast"
        )
    elif precision == "bf16-mixed" and not has_fast_bf16(device):
        yield advice(
            f"this {device.type} only emulates bf16, which is slower than float32; write "
            "trainer.precision=auto"
        )


def validation(cfg: DictConfig, data: ImageData, steps: int) -> Iterator[Remark]:
    """Checks that the validation loss is measured often enough for a curve to show overfitting."""
    if not len(data.validation_labels()):
        yield advice(
            "no training images are kept for validation, so runs cannot be chosen by val/loss; "
            "write data.validation_size=auto"
        )
        return
    every = cfg.validate_every_n_steps
    if steps // every < FEW_VALIDATIONS and steps >= FEW_VALIDATIONS:
        yield advice(
            f"the validation loss is measured every {every} steps in a run of {steps}, too rarely "
            f"for a curve; write validate_every_n_steps={max(1, steps // 10)}"
        )


def evaluation(task: DiffusionTask) -> Iterator[Remark]:
    """Checks that metrics are measured if the images allow it."""
    if task.metrics is None and task.datamodule.native_shape[0] in (1, 3):
        yield advice(
            "FID and KID are not measured; remove callbacks.evaluation=null, or run "
            "`diffusion-lab evaluate run=...` afterwards"
        )


def sample_counts(task: DiffusionTask, data: ImageData) -> Iterator[Remark]:
    """Checks that there are enough images for FID, and equally many samples and real images."""
    metrics = task.metrics
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


def class_counts(task: DiffusionTask) -> Iterator[Remark]:
    """Checks that there are enough samples of each class for its own FID."""
    metrics, classes = task.metrics, task.datamodule.num_classes
    if metrics is not None and metrics.per_class and metrics.num_samples < FEW_PER_CLASS * classes:
        yield warning(
            f"metrics.per_class=true compares {metrics.num_samples // classes} samples of each "
            f"class, too few for a FID; write metrics.num_samples={FEW_PER_CLASS * classes} or "
            "more"
        )


OF_SETTINGS = (
    *(data_std, largest_noise, schedule_end, combination, tokens, labels, sampling, batch, epochs),
    *(memorization, weight_averaging, warm_up, learning_rate, precision, validation, evaluation),
    *(sample_counts, class_counts),
)
