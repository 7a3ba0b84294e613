"""Checks that schedule, network, sampler and guidance suit the data and one another."""

import math
from collections.abc import Iterator

import torch

from diffusion_lab.training.doctor.finding import Remark, advice, warning
from diffusion_lab.training.doctor.planned_run import PlannedRun

# ratios of the data's standard deviation to the assumed one: at 1.25 a network's targets are off by
# half in variance, at 2 by a factor of four; an error in the inputs alone matters less
OFF, FAR_OFF = 1.25, 2.0
FAR_NOISE = 3.0  # largest noise over the largest distance; levels beyond it teach nothing
REMAINING_SIGNAL = 0.03  # alpha / sigma at t = 1: DDPM leaves 0.006, Stable Diffusion 0.068
FEWEST_TOKENS = 16  # a grid of 4 x 4, below which there is little to attend to
FEW_STEPS, MANY_STEPS = 5, 500  # sampler steps for a model that is not distilled
LARGE_SCALE = 5.0  # guidance scale above which pixels saturate


def data_std(run: PlannedRun) -> Iterator[Remark]:
    """Compares the data's standard deviation with the one that scales the network's values."""
    module, std = run.task.module, float(run.clean.std())
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


def largest_noise(run: PlannedRun) -> Iterator[Remark]:
    """Compares an exploding schedule's largest noise with the largest distance of two images."""
    # NCSNv2's technique 1 (arXiv:2006.09011); the distance in a sample is a little too small
    schedule = run.task.pipeline.schedule
    sigma = float(schedule(torch.ones(())).sigma)
    if not schedule.explodes:
        return
    images = run.clean.flatten(1).float()
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


def schedule_end(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the schedule ends in pure noise, from which samples start."""
    schedule = run.task.pipeline.schedule
    end = schedule(torch.ones(()))
    left = float(end.alpha / end.sigma)
    if not schedule.explodes and left > REMAINING_SIGNAL:
        yield warning(
            f"the schedule's noisiest level still contains {left:.1%} of the image, but sampling "
            "starts from pure noise, so brightness tends to the mean; write "
            "schedule=zero_terminal_snr objective=v_prediction, or schedule=ddpm_linear"
        )


def combination(run: PlannedRun) -> Iterator[Remark]:
    """Repeats the advice that training itself gives."""
    for line in run.task.advice():
        yield warning(line)


def tokens(run: PlannedRun) -> Iterator[Remark]:
    """Checks that patches are neither too few to show detail nor too many to afford."""
    denoiser, own = run.task.module.denoiser, run.cfg.backbone
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


def labels(run: PlannedRun) -> Iterator[Remark]:
    """Checks that labels carry information, and that dropping them serves guidance."""
    task = run.task
    guidance, dropped = task.pipeline.guidance, task.module.objective.noising.label_dropout
    if not task.module.denoiser.conditioning.conditional:
        return
    if task.datamodule.num_classes == 1:
        yield advice(
            "all images have the same label, which carries no information; write conditioning=none"
        )
    elif dropped > 0 and not guidance.uses_weak and guidance.weak_run is None:
        yield advice(
            f"objective.label_dropout={dropped} trains an unconditional model for "
            "guidance, but this run is evaluated without guidance; write guidance=classifier_free, "
            "or objective.label_dropout=0 if you will never use it"
        )


def sampling(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the sampler's steps and the guidance scale are in the range that works."""
    sampler, guidance = run.task.pipeline.sampler, run.task.pipeline.guidance
    adaptive = sampler.adaptive
    # of models for few steps: jumps, consistency models, and students with straight paths
    few = sampler.jumps or sampler.needs_consistency or run.task.teacher is not None
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


CHECKS = (data_std, largest_noise, schedule_end, combination, tokens, labels, sampling)
