"""Folders of diffusers: U-Nets and DiTs, alone or in a pipeline with scheduler and autoencoder."""

import re
from pathlib import Path
from typing import Any

from diffusion_lab.backbone.diffusers_networks import PUBLISHED, network_class, settings_of
from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import settings
from diffusion_lab.runs.files import LOOP, LOOP_BEGINS
from diffusion_lab.runs.importing.kind.base import BACKBONE, Imported, Kind, assigned, with_null_row
from diffusion_lab.runs.importing.reading import read_settings
from diffusion_lab.runs.to_diffusers.scheduler import PREDICTIONS, STEPS

PARTS = ("unet", "transformer", "")  # folders of the network: in a pipeline, or itself
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
OLD_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}
CLASSES = {  # the setting of their number, and whether the network knows a null label
    "UNet2DModel": ("num_class_embeds", False),
    "DiTTransformer2DModel": ("num_embeds_ada_norm", True),
}
TABLE = "class_embedding.weight"  # of a U-Net
VAE = "vae"  # the folder of the autoencoder in a pipeline
TAKEN = ("unet", "transformer", "scheduler", VAE)  # parts of a pipeline that can be imported
LEARNED = (
    "objective/loss/variance=hybrid",
    "sampler=ddpm",
    "sampler/time_grid=linspace",
    "sampler.variance=learned",
)


@settings
class DiffusersFolders(Kind):
    """UNet2DModel and DiTTransformer2DModel of diffusers, which are opened as they are.

    A pipeline's scheduler becomes the schedule and the prediction, its autoencoder the first stage.
    """

    recipe = ("backbone=diffusers_model", "conditioning=raw_labels", "objective=ddpm")

    def read(self, path: Path) -> Imported:
        require_foreign(path)
        parts = read_json(path / "model_index.json").items()  # {} if there is none
        # each part has its library and class; null, null if a pipeline goes without
        named = [name for name, part in parts if isinstance(part, list) and any(part)]
        if left := ", ".join(name for name in named if name not in TAKEN):
            raise UserError(
                f"{path} is a pipeline with {left}, without which it does not draw its images; "
                f"only pipelines of {', '.join(TAKEN)} can be imported"
            )
        in_latents = (path / VAE).is_dir()
        if VAE in named and not in_latents:
            raise UserError(f"{path / VAE} is missing; get the folder again")
        folder, name, given = network_of(path)
        check_plain(folder, {key: given[key] for key in settings_of(name) if key in given})
        file = next((folder / each for each in WEIGHTS if (folder / each).is_file()), None)
        if file is None:
            raise UserError(f"{folder} has no {WEIGHTS[0]}; save the network with diffusers again")
        say(f"Reading {file}")
        network = loaded(folder, name)
        config, tensors = network.config, network.state_dict()
        own = {key: config[key] for key in settings_of(name)}
        if kind := own.get("class_embed_type"):
            raise UserError(
                f"{folder} has class_embed_type={kind}, so its labels are no classes; only a "
                "network with a table of classes, or without labels, can be imported"
            )
        overrides = scheduler_overrides(path, in_latents)
        key, has_null = CLASSES[name]
        classes = own[key] or 0
        if not has_null:
            overrides.append("objective.label_dropout=0.0")
            if classes:
                tensors[TABLE], own[key] = with_null_row(tensors[TABLE]), classes + 1
        channels, size = config["in_channels"], config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        if config["out_channels"] == 2 * channels:
            overrides += LEARNED
        overrides += assigned("backbone", {"name": name, "settings": own})
        shape = image_shape = (channels, height, width)
        if in_latents:
            overrides.append("first_stage=hub_vae")
            overrides += assigned("first_stage", {"path": str(path / VAE)})
            widths = read_settings(path / VAE / "config.json").get("block_out_channels", [1])
            factor = 2 ** (len(widths) - 1)  # pixels along a side for each of a latent
            image_shape = (3, factor * height, factor * width)
        ours = {f"{BACKBONE}network.{key}": tensor for key, tensor in tensors.items()}
        return Imported(file, ours, shape, image_shape, classes, overrides)


def require_foreign(path: Path) -> None:
    """Raises UserError for an export of ours: its loop has what its settings cannot say."""
    alone = not (path / "scheduler").is_dir()  # a network's folder in that of a pipeline
    for folder in (path, *([path.parent] if alone else [])):
        loop = folder / LOOP
        if loop.is_file() and loop.read_bytes().startswith(LOOP_BEGINS.encode()):
            raise UserError(
                f"{path} was exported from a run for diffusers, and has not all that the run "
                "has; give the run itself, or its export without format=diffusers"
            )


def network_of(path: Path) -> tuple[Path, str, dict[str, Any]]:
    """The folder of the network, the name of its class, and its config.json."""
    found = [path / part for part in PARTS if (path / part / "config.json").is_file()]
    if not found:
        raise UserError(f"{path} has no config.json of a network; give a folder of diffusers")
    config = read_settings(found[0] / "config.json")
    name = str(config.get("_class_name", "network of another library"))
    name = OLD_NAMES.get(name, name)
    if name not in PUBLISHED:
        raise UserError(f"{found[0]} is a {name}; only {' and '.join(PUBLISHED)} can be imported")
    return found[0], name, config


def loaded(folder: Path, name: str) -> Any:
    """The network in a folder; raises UserError if that is damaged or does not have all weights."""
    try:
        network, info = network_class(name).from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # the settings of a folder may be anything
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be read by diffusers ({reason})") from error
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(f"{folder} does not fit its own config.json: see {wrong[0]}")
    return network.float()


def check_plain(folder: Path, given: dict[str, Any]) -> None:
    """Raises UserError unless all settings consist of numbers, words and lists.

    Other values could be read as configurations, which name classes to build.
    """

    def is_plain(value: object) -> bool:
        if isinstance(value, list):
            return all(map(is_plain, value))
        if isinstance(value, str):
            return re.fullmatch(r"[\w.-]*", value) is not None
        return value is None or isinstance(value, bool | int | float)

    if wrong := [key for key, value in given.items() if not is_plain(value)]:
        raise UserError(
            f"{folder}/config.json has a {wrong[0]} that is no number, word or list of them"
        )


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
    if config.get("trained_betas"):
        raise UserError(
            f"{file} has a {config.get('_class_name')} with a list of trained_betas, which has no "
            f"counterpart here; give a pipeline with a beta_schedule of {', '.join(TABLES)}"
        )
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
    if table is None or prediction is None or steps != STEPS:
        raise UserError(
            f"{pipeline} has a {config.get('_class_name')} with beta_schedule="
            f"{config.get('beta_schedule')}, prediction_type={config.get('prediction_type')} and "
            f"num_train_timesteps={steps}, which has no counterpart here; there are "
            f"{', '.join(TABLES)} and {', '.join(OPTIONS)}, of {STEPS} steps"
        )
    found, key = [f"schedule={table}"], "schedule"
    if config.get("rescale_betas_zero_snr"):
        found = ["schedule=zero_terminal_snr", f"schedule@schedule.schedule={table}"]
        key = "schedule.schedule"
    if table != "ddpm_cosine":
        betas = {"beta_start": 1e-4, "beta_end": 0.02}  # diffusers' defaults
        found += [f"{key}.{name}={float(config.get(name, given))}" for name, given in betas.items()]
    return [*found, f"objective/prediction={prediction}"]
