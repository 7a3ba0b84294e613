"""Schedules and predictions as schedulers of diffusers."""

from typing import Any

import torch
from omegaconf import DictConfig

from diffusion_lab.assembly.model import Drawable
from diffusion_lab.backbone.diffusers_networks import network_class
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.rules import option
from diffusion_lab.diffusion.denoiser import NOISE_LABELS
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule import (
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    NoiseSchedule,
    Rectified,
    ZeroTerminalSNR,
    follows,
)

STEPS = 1000  # of a table; networks are told the place of a noise level among them
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # prediction_type by option
BETAS: dict[type[NoiseSchedule], str] = {  # beta_schedule by schedule
    DDPMLinear: "linear",
    DDPMScaledLinear: "scaled_linear",
    DDPMCosine: "squaredcos_cap_v2",
}
CLOSE = 1e-5  # largest difference of a level's alpha


def without_counterpart(option: str, reason: str, remedy: str = "leave format out") -> UserError:
    """The error for an option, as written in a command, of a run that diffusers cannot hold."""
    return UserError(f"{option} cannot be exported with format=diffusers: {reason}; {remedy}")


def scheduler_of(model: Drawable, cfg: DictConfig) -> Any:
    """The scheduler of a model with the configuration `cfg`: DDIM's, or Euler's for flow matching.

    Raises UserError if diffusers has none with the same levels, prediction and noise labels.
    """
    straight, name = type(model.schedule) is Rectified, option(model.denoiser.prediction)
    if straight and name != "flow":
        raise without_counterpart(
            f"objective/prediction={name}",
            "on schedule=rectified, FlowMatchEulerDiscreteScheduler integrates a velocity alone",
            "train with objective/prediction=flow, or leave format out",
        )
    if straight:
        scheduler = network_class("FlowMatchEulerDiscreteScheduler")(num_train_timesteps=STEPS)
    else:
        scheduler = _table(model, cfg.schedule)
    known = {name: NOISE_LABELS[name] for name in (("time",) if straight else ("index", "time"))}
    if model.denoiser.noise_label not in known.values():
        name = next(name for name, f in NOISE_LABELS.items() if f is model.denoiser.noise_label)
        raise without_counterpart(
            f"denoiser.noise_label={name}",
            "networks of diffusers are told the place of a noise level among 1000",
            f"train with denoiser.noise_label={' or '.join(known)}, or leave format out",
        )
    return scheduler


def first_place(model: Drawable) -> int:
    """The number of a table's first level as the network is told it; diffusers says 0."""
    on_table = type(model.schedule) is not Rectified
    return int(on_table and model.denoiser.noise_label is NOISE_LABELS["time"])


def _table(model: Drawable, cfg: DictConfig) -> Any:
    schedule, name, clip = model.schedule, option(model.denoiser.prediction), model.denoiser.clip
    if not follows(schedule, "preserving") or schedule.discrete_steps not in (None, STEPS):
        raise without_counterpart(
            f"the schedule {type(schedule).__name__}",
            f"schedulers of diffusers have {STEPS} levels with alpha^2 + sigma^2 = 1, or those of "
            "flow matching",
            "train with a schedule such as cosine or ddpm_linear, or with schedule=rectified and "
            "objective=flow_matching, or leave format out",
        )
    if name not in PREDICTIONS:
        raise without_counterpart(
            f"objective/prediction={name}",
            f"on this schedule, schedulers of diffusers know {', '.join(PREDICTIONS)} alone",
        )
    levels = schedule(torch.arange(1, STEPS + 1) / STEPS)
    for betas in (named_betas(schedule, cfg), trained_betas(levels)):
        scheduler = network_class("DDIMScheduler")(
            **betas,
            num_train_timesteps=STEPS,
            prediction_type=PREDICTIONS[name],
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
            timestep_spacing="trailing",
        )
        # not alpha^2, in which small alphas would hide
        if (scheduler.alphas_cumprod.sqrt() - levels.alpha).abs().max() < CLOSE:
            return scheduler
    raise without_counterpart(
        f"the schedule {type(schedule).__name__}",
        "its levels are not those of diffusers in float32",
    )


def named_betas(schedule: NoiseSchedule, cfg: DictConfig) -> dict[str, object]:
    """The settings of a scheduler's betas by their name, for schedules that diffusers may know."""
    if rescaled := isinstance(schedule, ZeroTerminalSNR):
        schedule, cfg = schedule.schedule, cfg.schedule
    ends = {key: float(cfg[key]) for key in ("beta_start", "beta_end") if key in cfg}
    name = BETAS.get(type(schedule), "linear")
    return {"beta_schedule": name, "rescale_betas_zero_snr": rescaled, **ends}


def trained_betas(levels: NoiseLevel) -> dict[str, object]:
    """The settings of a scheduler's betas as a list of numbers, for levels of falling alpha."""
    alpha2 = torch.cat([levels.alpha.new_ones(1), levels.alpha**2])
    return {"trained_betas": (1 - alpha2[1:] / alpha2[:-1]).tolist()}
