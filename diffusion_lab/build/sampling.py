"""Checks, before training and before sampling, that sampler and guidance fit a model."""

from contextlib import suppress

import torch
from torch import Tensor

from diffusion_lab.build.model import Model
from diffusion_lab.common.messages import UserError
from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.objective import Objective, TeacherPairs
from diffusion_lab.diffusion.objective.jump_loss import Shortcut
from diffusion_lab.diffusion.sampler import Sampler
from diffusion_lab.diffusion.sampler.runge_kutta import ToleranceError
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.pipeline import with_steps


def check_sampling(model: Model, sampler: Sampler, guidance: Guidance) -> None:
    """Raises UserError if the sampler or guidance does not fit the model, before any training."""
    objective, conditional = model.objective, model.denoiser.conditioning.conditional
    if sampler.time_grid.needs_table and model.schedule.discrete_steps is None:
        raise UserError(
            "this sampler.time_grid needs a schedule with a table, and this one has none; use "
            "sampler/time_grid=uniform, or a discrete schedule such as schedule=ddpm_linear"
        )
    if getattr(sampler, "variance", None) == "learned" and objective.variance_loss is None:
        raise UserError(
            "sampler.variance=learned needs a model trained with objective/variance_loss=hybrid; "
            "use sampler.variance=fixed_small with this model"
        )
    if sampler.jumps and not objective.jumps:
        raise UserError(
            f"sampler={type(sampler).__name__} needs a model that is told where a step goes, and "
            "this one is not; train with objective=mean_flow or objective=shortcut"
        )
    if objective.of_samples and not sampler.needs_consistency:
        raise UserError(
            f"sampler={type(sampler).__name__} follows the mean of the samples that an image may "
            "become, and this model's estimate is one of the samples; use sampler=few_step"
        )
    if sampler.needs_consistency and objective.jump_loss is None:
        raise UserError(
            f"sampler={type(sampler).__name__} needs a model of few steps, whose every estimate is "
            "a sample; train with objective=ect, consistency_distillation, mean_flow or shortcut"
        )
    check_guidance(model.first_stage, sampler, guidance)
    if guidance.weak_run is not None:
        return  # the weak model replaces the unconditional one
    if guidance.uses_weak and guidance.uses_strong and not conditional:
        raise needs_labels(guidance.scale, "guidance=none")
    if guidance.uses_weak and conditional and objective.label_dropout == 0:
        raise needs_dropped_labels(guidance.scale)


def needs_labels(scale: float, without: str) -> UserError:
    """The error for guidance of an unconditional model; `without` is the override for none."""
    return UserError(
        f"guidance.scale={scale} needs a model trained on labels; use {without}, or train with "
        "conditioning=class_label"
    )


def needs_dropped_labels(scale: float) -> UserError:
    """The error for guidance by an unconditional model that was not trained."""
    return UserError(
        f"guidance.scale={scale} uses the unconditional model, which objective.label_dropout=0 "
        "does not train; train with objective.label_dropout=0.1"
    )


def check_noise(model: Model, sampler: Sampler) -> None:
    """Raises UserError if the sampler adds noise, and the model learned from dependent pairs."""
    if model.objective.coupling is None and not isinstance(model.objective.teacher, TeacherPairs):
        return
    drawn = []

    def randn_like(x: Tensor) -> Tensor:
        drawn.append(x)
        return torch.zeros_like(x)

    x = torch.ones(1, 1, 1, 1)
    with suppress(ToleranceError):  # said when images are drawn; such a sampler adds no noise
        sampler(lambda *_: Estimate(x, 0 * x), x, model.schedule, randn_like)  # all of its steps
    if drawn:
        raise UserError(
            "this sampler adds noise on its way, for which it needs the score, and a model of "
            "dependent pairs (of a coupling, or reflow) does not give it; use one without noise, "
            "such as sampler=dpm_solver, unipc or heun, or train without such pairs"
        )


def check_steps(model: Model, sampler: Sampler, steps: int) -> None:
    """Raises UserError if the sampler cannot draw in this number of `also_steps`."""
    key = f"callbacks.evaluation.also_steps=[{steps}]"
    if sampler.adaptive:
        raise UserError(
            f"{key} has no meaning for {type(sampler).__name__}, which chooses its own steps; "
            "leave also_steps out"
        )
    other = with_steps(sampler, steps)
    try:
        other.levels(model.schedule)
    except ValueError as error:
        raise UserError(f"{key} does not fit sampler.time_grid: {error}") from error
    try:
        check_noise(model, other)  # a sampler of one step may add none, and of two some
    except UserError as error:
        raise UserError(f"with {key} {error}") from error


def between_shortcuts(objective: Objective, sampler: Sampler) -> str | None:
    """The warning that the sampler asks for jumps that training never made, if it does."""
    shortcuts = objective.jump_loss
    jumping = sampler.jumps or sampler.needs_consistency
    if not isinstance(shortcuts, Shortcut) or not jumping:
        return None
    t = sampler.levels(objective.schedule).t
    trained = shortcuts.trains(t[:-1], t[1:] if sampler.jumps else torch.zeros_like(t[1:]))
    if trained.all():
        return None
    # to clean data it goes from one half of the path, and not from two thirds
    most = shortcuts.most if sampler.jumps else 2
    power = 1 << (min(sampler.steps, most).bit_length() - 1)
    return (
        f"training with objective/jump_loss=shortcut never makes {int((~trained).sum())} of the "
        f"{len(trained)} jumps of the sampler, which lie between those that it makes; for these "
        f"alone write sampler.steps={power} sampler/time_grid=uniform "
        "sampler.time_grid.sigma_min=0"
    )


def check_guidance(first_stage: FirstStage, sampler: Sampler, guidance: Guidance) -> None:
    """Raises UserError if a kind of guidance does not suit the sampler, or latents."""
    if guidance.keeps_weak_noise and not sampler.one_jump:
        raise UserError(
            "guidance=cfg_plus_plus takes x0 from one estimate and the noise from another, which "
            "only samplers of one jump per step can; use sampler=ddim, euler, ddpm, "
            "euler_ancestral or reverse_sde"
        )
    if sampler.jumps or sampler.needs_consistency:
        if guidance.by_classifier:
            raise UserError(
                "guidance=classifier moves the mean of the samples that an image may become, and "
                f"sampler={type(sampler).__name__} asks for another answer; use "
                "guidance=classifier_free"
            )
        if getattr(guidance, "zero_above", None) is not None:
            raise UserError(
                "guidance=cfg_zero_star leaves out steps on pure noise, and a model of few steps "
                "has none to spare; write guidance.zero_above=null"
            )
    if sampler.jumps and guidance.clip is not None:
        raise UserError(
            f"guidance.clip={guidance.clip} does not fit sampler={type(sampler).__name__}: the "
            "network's answer for a jump is no image, and may exceed any limit; write "
            "guidance.clip=null guidance.percentile=null, or use sampler=few_step"
        )
    if first_stage.of_pixels:
        return
    if guidance.clip is not None:
        raise UserError(
            f"guidance.clip={guidance.clip} is for pixels in [-1, 1], and latents have no limit; "
            "write guidance.clip=null guidance.percentile=null"
        )
    if guidance.by_classifier:
        raise UserError(
            "guidance=classifier classifies the estimate of an image, and this run diffuses the "
            "latents of an encoder; use guidance=classifier_free"
        )
