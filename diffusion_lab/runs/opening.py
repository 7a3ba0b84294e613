"""How a trained run is opened: its kind, and the settings that a command takes over from it."""

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_lab.build.overrides import parse
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs.autoencoder_run import AutoencoderRun
from diffusion_lab.runs.diffusion_run import DiffusionRun
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.open_run import OpenRun


def kind_of(saved: DictConfig) -> type[OpenRun]:
    """The kind of the run with the configuration `saved`."""
    return AutoencoderRun if "autoencoder" in saved else DiffusionRun


def open_run(cfg: DictConfig) -> OpenRun:
    """Opens the run `cfg.run`, whatever its kind; raises UserError."""
    saved = load_config(cfg.run)
    return kind_of(saved).open(cfg, saved)


def open_diffusion_run(cfg: DictConfig) -> DiffusionRun:
    """Opens the run `cfg.run` of a diffusion model; raises UserError for another kind of run."""
    return DiffusionRun.open(cfg, load_diffusion_config(cfg.run))


def load_diffusion_config(folder: str) -> DictConfig:
    """The configuration of the run of a diffusion model; raises UserError for another kind."""
    saved = load_config(folder)
    if kind_of(saved) is not DiffusionRun:
        raise UserError(
            f"{folder} is an autoencoder, which only `sample` and `evaluate` draw from; give the "
            "run of a diffusion model"
        )
    return saved


def inherit(
    cfg: DictConfig, saved: DictConfig, groups: tuple[str, ...], overrides: list[str]
) -> None:
    """Gives `cfg` the choice of a run, `saved`, in each group, unless `overrides` choose another.

    Single values in `overrides`, as in sampler.steps=20, change the run's choice. A group in which
    its kind has no choice is taken out of `cfg`; raises UserError for an override of it.
    """
    keys = {override.key_or_group: override for override in parse(overrides)}
    with open_dict(cfg):
        cfg.data = saved.data
        for group in groups:
            if group in kind_of(saved).groups_without_choice:
                if chosen := [key for key in keys if key.split(".")[0].split("/")[0] == group]:
                    raise UserError(f"this run has no {group}; leave {chosen[0]}=... out")
                del cfg[group]
            elif group not in keys:
                _take_over(cfg, saved, group, keys)


def _take_over(cfg: DictConfig, saved: DictConfig, group: str, keys: dict[str, Override]) -> None:
    """Copies one group of `saved`, but for the parts and values that overrides, by key, set."""
    parts = [key.replace("/", ".") for key in keys if key.startswith(f"{group}/")]
    chosen = {part: OmegaConf.select(cfg, part) for part in parts}
    cfg[group] = saved[group]
    for part, option in chosen.items():
        OmegaConf.update(cfg, part, option, merge=False)
    for key, override in keys.items():
        if key.startswith(f"{group}."):
            OmegaConf.update(cfg, key, override.value())
