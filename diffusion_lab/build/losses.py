"""Checks before training that losses of jumps and of scores fit the other parts of a model."""

import math

import torch
from omegaconf import DictConfig

from diffusion_lab.common.messages import UserError
from diffusion_lab.diffusion.objective import (
    X0,
    Objective,
    SecondMoment,
    TeacherModel,
    TeacherPairs,
)
from diffusion_lab.diffusion.objective.jump_loss import JumpLoss, MeanFlow, Shortcut

DRAWN = 4096  # levels at which the weights of a score are looked at
LARGEST_WEIGHT = 1e5  # of a score's error, in units of 1 / sigma^2


def check_losses(objective: Objective, denoiser: DictConfig, shape: tuple[int, ...]) -> None:
    """Raises UserError if losses other than that of denoising do not fit one another, or the rest.

    `denoiser` is that part of a configuration, and `shape` that of the images or latents.
    """
    if objective.label_dropout == 1:
        raise UserError(
            "objective.label_dropout=1 trains without any label; write a smaller number, or "
            "conditioning=none"
        )
    check_teacher(objective)
    check_jumps(objective, denoiser.clip, denoiser.self_conditioning)
    check_score_target(objective)
    check_score_loss(objective, denoiser.clip, denoiser.self_conditioning, shape)


def check_teacher(objective: Objective) -> None:
    """Raises UserError if a teacher is missing, not needed, or not free to choose the noise."""
    loss = objective.jump_loss
    asked = loss is not None and loss.teaches
    if asked != isinstance(objective.teacher, TeacherModel):
        raise UserError(
            "objective/jump_loss=distillation and objective/teacher=model need each other; write "
            "objective=consistency_distillation, which chooses both"
        )
    if objective.teacher is not None and objective.coupling is not None:
        raise UserError(
            "objective/teacher chooses the noise of each sample, which a coupling would exchange; "
            "write coupling=none"
        )
    if isinstance(objective.teacher, TeacherPairs) and objective.offset_noise:
        raise UserError(
            "objective/teacher=pairs chooses the noise of each sample, which "
            "objective.offset_noise would change; write objective.offset_noise=0"
        )


def check_shares(loss: JumpLoss) -> None:
    """Raises UserError for shares of samples with which a loss trains no jumps, or nothing else."""
    if isinstance(loss, Shortcut) and not 0 < loss.share < 1:
        raise UserError(
            f"objective.jump_loss.share={loss.share} trains jumps alone, or none; write a number "
            "above 0 and below 1"
        )
    if isinstance(loss, MeanFlow) and loss.instant == 1:
        raise UserError(
            "objective.jump_loss.instant=1 trains no jumps; write a number below 1, or "
            "objective=flow_matching"
        )


def check_jumps(objective: Objective, clip: float | None, self_conditioning: bool) -> None:
    """Raises UserError if the loss of jumps, where there is one, does not fit the other parts."""
    loss = objective.jump_loss
    if loss is None:
        return
    check_shares(loss)
    name = "objective/jump_loss takes the place of the denoising loss, so"
    if objective.weighting is not None:
        raise UserError(f"{name} a weighting has no effect; write objective/weighting=none")
    if objective.variance_loss is not None:
        raise UserError(f"{name} no variance is learned; write objective/variance_loss=none")
    if objective.huber is not None:
        raise UserError(f"{name} objective.huber has no effect; write objective.huber=null")
    if self_conditioning:
        raise UserError(
            "denoiser.self_conditioning=true makes a step depend on the one before, and a model of "
            "few steps has none; write denoiser.self_conditioning=false"
        )
    if isinstance(objective.time_sampler, SecondMoment) and loss.two_levels:
        raise UserError(
            "objective/time_sampler=second_moment learns from losses at the levels that it draws, "
            "and jumps have two; write objective/time_sampler=logit_normal"
        )
    if clip is not None:
        why = (
            "the network's answer for a jump is no image, and may exceed any limit"
            if loss.two_levels
            else "its loss compares estimates, and where they are clipped it has no gradient"
        )
        raise UserError(
            f"denoiser.clip={clip} does not fit this objective/jump_loss: {why}; write "
            "denoiser.clip=null"
        )
    if not loss.two_levels and isinstance(objective.prediction, X0):
        raise UserError(
            "objective/jump_loss of a consistency model needs an estimate that is the image itself "
            "where there is no noise, which the network's own output is not; write "
            "objective/prediction=edm, v, flow or eps"
        )
    if isinstance(loss, MeanFlow) and loss.guidance != 1 and not objective.label_dropout:
        raise UserError(
            f"objective.jump_loss.guidance={loss.guidance} asks the network without labels, which "
            "objective.label_dropout=0 does not train; write objective.label_dropout=0.1"
        )
    if objective.schedule.discrete_steps is not None:
        raise UserError(
            "objective/jump_loss needs levels between those of a table; use a continuous schedule, "
            "such as schedule=rectified or schedule=cosine"
        )


def check_score_target(objective: Objective) -> None:
    """Raises UserError if score matching, where it is chosen, does not suit noise or weights."""
    if objective.score_loss is None:
        return
    noise = {
        "coupling=none": objective.coupling is not None,
        "objective.offset_noise=0": objective.offset_noise,
        "objective/teacher=none": objective.teacher is not None,
    }
    for remedy, wrong in noise.items():
        if wrong:
            raise UserError(
                "objective/score_loss learns the score of images with independent normal noise, "
                f"and this noise is another; write {remedy}"
            )
    level, _ = objective.time_sampler(DRAWN, objective.schedule, torch.Generator().manual_seed(0))
    weight = objective.weight_of_score(level) / level.sigma**2
    if not weight.nan_to_num(math.inf).max() < LARGEST_WEIGHT:
        raise UserError(
            "objective/score_loss would be ruled by single samples that are almost pure noise, "
            "where this prediction and weighting count errors of the score without limit; write "
            "objective/weighting=snr, and a schedule that keeps some signal"
        )


def check_score_loss(
    objective: Objective, clip: float | None, self_conditioning: bool, shape: tuple[int, ...]
) -> None:
    """Raises UserError if a score matching loss does not fit the other parts, or the images."""
    loss = objective.score_loss
    if loss is None:
        return
    others = {"jump_loss": objective.jump_loss, "variance_loss": objective.variance_loss}
    for name, other in {**others, "uncertainty": objective.uncertainty}.items():
        if other is not None:
            raise UserError(
                f"objective/score_loss takes the place of the denoising loss, and may be negative, "
                f"which objective/{name} does not expect; write objective/{name}=none"
            )
    if objective.huber is not None:
        raise UserError("objective/score_loss is no error to bound; write objective.huber=null")
    if clip is not None:
        raise UserError(
            "objective/score_loss needs a derivative of the estimate, which is 0 beyond "
            f"denoiser.clip={clip}; write denoiser.clip=null"
        )
    if self_conditioning:
        raise UserError(
            "objective/score_loss takes a derivative of the estimate with respect to x, and an "
            "estimate from an earlier one depends on x in that, too; write "
            "denoiser.self_conditioning=false"
        )
    if loss.most is not None and math.prod(shape) > loss.most:
        raise UserError(
            f"objective/score_loss=exact takes one derivative for each of {math.prod(shape)} "
            f"numbers, more than {loss.most}; write objective/score_loss=sliced"
        )


def check_derivative(objective: Objective, compiled: object, recomputed: bool) -> None:
    """Raises UserError if the objective takes a derivative that these settings do not let it."""
    if not objective.forward_mode:
        return
    part = "jump_loss=mean_flow" if objective.score_loss is None else "score_loss"
    name = f"objective/{part} takes a forward-mode derivative of the network, which"
    if compiled is True:
        raise UserError(f"{name} a compiled one does not have; write compile=auto")
    if recomputed:
        raise UserError(
            f"{name} layers that run again do not have; write activation_checkpointing=false"
        )
