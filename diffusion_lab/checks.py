"""Cross-checks of a composition, made before anything is built or trained."""

import torch

from diffusion_lab.errors import UserError
from diffusion_lab.guidance import Guidance
from diffusion_lab.objective import Objective
from diffusion_lab.sampler import Sampler
from diffusion_lab.schedule import NoiseSchedule


def check_training(schedule: NoiseSchedule, objective: Objective, noise_label: str) -> None:
    """Refuses what cannot be trained, with a sentence saying what to change."""
    end = schedule(torch.ones(()))
    reaches_noise = bool(end.alpha == 0)
    if not objective.prediction.x0_gain(end).isfinite():
        name = type(objective.prediction).__name__.lower()
        raise UserError(
            f"objective/prediction={name} cannot tell the image on pure noise, and this schedule "
            "reaches it (alpha = 0 at t = 1); use objective/prediction=v, flow or x0, or a "
            "schedule that keeps some signal, such as schedule=cosine"
        )
    if noise_label == "index" and schedule.discrete_steps is None:
        raise UserError(
            "denoiser.noise_label=index counts the levels of a table, and this schedule has none; "
            "use denoiser.noise_label=time, or a discrete schedule such as schedule=ddpm_linear"
        )
    if noise_label == "log_sigma" and reaches_noise:
        raise UserError(
            "denoiser.noise_label=log_sigma is infinite on pure noise, which this schedule "
            "reaches; use denoiser.noise_label=time"
        )


def check_sampling(
    schedule: NoiseSchedule,
    objective: Objective,
    sampler: Sampler,
    guidance: Guidance,
    conditional: bool,
) -> None:
    """Refuses what cannot be sampled from a model, before it is trained for hours."""
    sampler.time_grid(schedule, sampler.steps)  # says itself if it does not fit
    if guidance.scale not in (0, 1) and not conditional:
        raise UserError(
            f"guidance.scale={guidance.scale} needs a model trained on labels; use guidance=none, "
            "or train with conditioning=class_label"
        )
    if guidance.scale != 1 and conditional and objective.label_dropout == 0:
        raise UserError(
            f"guidance.scale={guidance.scale} uses the unconditional model, which "
            "objective.label_dropout=0 never trains; write objective.label_dropout=0.1 in training"
        )
