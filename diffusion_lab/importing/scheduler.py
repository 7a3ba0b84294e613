"""The scheduler of a diffusers folder, as a schedule and a prediction of ours."""

from pathlib import Path

from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.runs.to_diffusers.scheduler import PREDICTIONS, STEPS

FILES = ("scheduler/scheduler_config.json", "scheduler_config.json")
TABLES = {  # the option of `schedule` by beta_schedule
    "linear": "ddpm_linear",
    "scaled_linear": "ddpm_scaled_linear",
    "squaredcos_cap_v2": "ddpm_cosine",
}
OPTIONS = {kind: option for option, kind in PREDICTIONS.items()}  # of predictions


def schedule_overrides(pipeline: Path) -> list[str]:
    """The overrides of the scheduler in a pipeline; DDPM's if it has none.

    Raises UserError for a scheduler without a counterpart.
    """
    config = next(filter(None, (read_json(pipeline / file) for file in FILES)), None)
    if config is None:
        say(f"{pipeline} has no {FILES[0]}, so its schedule is taken to be ddpm_linear")
        return ["schedule=ddpm_linear"]
    if "FlowMatch" in config.get("_class_name", ""):
        return ["schedule=rectified", "objective/prediction=flow"]
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
