"""The scheduler of a diffusers folder, as a schedule and a prediction of ours."""

from pathlib import Path
from typing import Any

from diffusion_lab.common.messages import UserError, say
from diffusion_lab.importing.reading import read_settings
from diffusion_lab.runs.to_diffusers.scheduler import PREDICTIONS, STEPS

FILES = ("scheduler/scheduler_config.json", "scheduler_config.json")
TABLES = {  # the option of `schedule` by beta_schedule
    "linear": "ddpm_linear",
    "scaled_linear": "ddpm_scaled_linear",
    "squaredcos_cap_v2": "ddpm_cosine",
}
CLIPPING = ("DDPMScheduler", "DDIMScheduler")  # where their configuration does not say
OPTIONS = {kind: option for option, kind in PREDICTIONS.items()}  # of predictions


def scheduler_overrides(pipeline: Path, in_latents: bool) -> list[str]:
    """The overrides of the scheduler in a pipeline, of latents or of pixels; DDPM's if it has none.

    Raises UserError for a scheduler that is damaged, or has no counterpart.
    """
    file = next((pipeline / file for file in FILES if (pipeline / file).is_file()), None)
    if file is None:
        say(f"{pipeline} has no {FILES[0]}, so its schedule is taken to be ddpm_linear")
        return ["schedule=ddpm_linear"]
    config = read_settings(file)
    if "FlowMatch" in config.get("_class_name", ""):
        if (shift := config.get("shift", 1.0)) != 1:
            say(f"{file} has shift={shift}, which moves the steps of sampling, and is left out")
        return ["schedule=rectified", "objective/prediction=flow"]
    return [*schedule_of(pipeline, config), *clip_of(file, config, in_latents)]


def clip_of(file: Path, config: dict[str, Any], in_latents: bool) -> list[str]:
    """The override of the limit of images that a scheduler keeps, if it does."""
    if config.get("thresholding") and not in_latents:  # in diffusers it replaces clip_sample
        share = float(config.get("dynamic_thresholding_ratio", 0.995))
        say(
            f"{file} has thresholding=true, which is a setting of sampling here; write "
            f"guidance.clip=1 guidance.percentile={share} when you sample"
        )
        return []
    if not config.get("clip_sample", config.get("_class_name") in CLIPPING):
        return []
    if in_latents:
        say(f"{file} has clip_sample=true, which is left out, as latents have no limit")
        return []
    return [f"denoiser.clip={float(config.get('clip_sample_range', 1.0))}"]


def schedule_of(pipeline: Path, config: dict[str, Any]) -> list[str]:
    """The overrides of schedule and prediction in a scheduler's configuration."""
    table = TABLES.get(config.get("beta_schedule", ""))
    prediction = OPTIONS.get(config.get("prediction_type", "epsilon"))
    steps = config.get("num_train_timesteps", STEPS)
    if table is None or prediction is None or config.get("trained_betas") or steps != STEPS:
        raise UserError(
            f"{pipeline} has a {config.get('_class_name')} with beta_schedule="
            f"{config.get('beta_schedule')}, prediction_type={config.get('prediction_type')} and "
            f"num_train_timesteps={steps}, which has no counterpart here; there are "
            f"{', '.join(TABLES)} and {', '.join(OPTIONS)}, of {STEPS} steps"
        )
    rescaled = config.get("rescale_betas_zero_snr", False)
    found, key = [f"schedule={table}"], "schedule"
    if rescaled:
        found = ["schedule=zero_terminal_snr", f"schedule@schedule.schedule={table}"]
        key = "schedule.schedule"
    if table != "ddpm_cosine":
        betas = {"beta_start": 1e-4, "beta_end": 0.02}  # diffusers' defaults
        found += [f"{key}.{name}={float(config.get(name, given))}" for name, given in betas.items()]
    return [*found, f"objective/prediction={prediction}"]
