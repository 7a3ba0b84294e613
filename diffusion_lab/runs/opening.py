"""Opens trained runs of each kind, and gives a command the settings of the run it works on."""

from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_lab.build import families
from diffusion_lab.build.overrides import parse
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs.autoencoder_run import AutoencoderRun
from diffusion_lab.runs.base_run import OpenRun
from diffusion_lab.runs.diffusion_run import DiffusionRun
from diffusion_lab.runs.family_runs import AutoregressiveRun, GANRun
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.images_run import ImagesRun
from diffusion_lab.runs.samplings import IMAGES

FAMILIES: dict[str, type[OpenRun]] = {
    families.DIFFUSION: DiffusionRun,
    families.AUTOREGRESSIVE: AutoregressiveRun,
    families.GAN: GANRun,
}


def kind_of(saved: DictConfig) -> type[OpenRun]:
    """The kind of the run with the configuration `saved`."""
    if IMAGES in saved:
        return ImagesRun
    if "autoencoder" in saved:
        return AutoencoderRun
    return FAMILIES[families.family_of(saved)]


def open_run(cfg: DictConfig) -> OpenRun:
    """Opens the run `cfg.run`, whatever its kind; raises UserError."""
    saved = load_config(cfg.run)
    return kind_of(saved).open(cfg, saved)


def open_diffusion_run(cfg: DictConfig) -> DiffusionRun:
    """Opens the run `cfg.run` of a diffusion model; raises UserError for another kind of run."""
    return DiffusionRun.open(cfg, load_diffusion_config(cfg.run))


def load_diffusion_config(folder: str) -> DictConfig:
    """Reads the configuration of a diffusion model's run; raises UserError for another kind."""
    saved = load_config(folder)
    if (kind := kind_of(saved)) is not DiffusionRun:
        raise UserError(f"{folder} is {kind.limits}; give the run of a diffusion model")
    return saved


def load_trained_config(folder: str | Path) -> DictConfig:
    """Reads the configuration of a run that was trained; raises UserError for images alone."""
    saved = load_config(folder)
    if kind_of(saved) is ImagesRun:
        raise UserError(f"{folder} is {ImagesRun.limits}; give a trained run")
    return saved


def inherit(
    cfg: DictConfig, saved: DictConfig, groups: tuple[str, ...], overrides: list[str]
) -> None:
    """Copies the data and `groups` of a run, `saved`, to `cfg`, except groups in `overrides`.

    The data are the run's whatever `overrides` say, unless they are one of `groups`. Single values
    in `overrides`, as in sampler.steps=20, change the run's option. A group that this kind of run
    does not have is removed from `cfg`; an override of it raises UserError.
    """
    keys = {override.key_or_group: override for override in parse(overrides)}
    with open_dict(cfg):
        if "data" not in groups:
            cfg.data = saved.data
        for group in groups:
            if group in kind_of(saved).groups_without_choice:
                if chosen := [key for key in keys if key.split(".")[0].split("/")[0] == group]:
                    raise UserError(f"this run has no {group}; leave {chosen[0]}=... out")
                del cfg[group]
            elif group not in keys:
                _take_over(cfg, saved, group, keys)


def _take_over(cfg: DictConfig, saved: DictConfig, group: str, keys: dict[str, Override]) -> None:
    """Copies one group of `saved`, except the parts and values that overrides (by key) set."""
    parts = [key.replace("/", ".") for key in keys if key.startswith(f"{group}/")]
    chosen = {part: OmegaConf.select(cfg, part) for part in parts}
    cfg[group] = saved[group]
    for part, option in chosen.items():
        OmegaConf.update(cfg, part, option, merge=False)
    for key, override in keys.items():
        if key.startswith(f"{group}."):
            OmegaConf.update(cfg, key, override.value())
