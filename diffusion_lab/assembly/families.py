"""The families of models, as all rooms see them: each is a folder of `families`, found by its name.

What the rooms ask a family for stands in two modules of its folder: `run` has RUN, the class that
opens its runs, and `task` has `build_task`, which builds all that a training needs. A family of
yours is one module with both, which `family` names.
"""

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import replaced
from diffusion_lab.common.messages import UserError

TRAINED = ("diffusion", "autoregressive", "gan")  # by `train`
DIFFUSION, AUTOENCODER, IMAGES = "diffusion", "autoencoder", "images"
HOME = "diffusion_lab.families."  # starts the names of modules of families


def family_of(cfg: DictConfig) -> str:
    """The family that the configuration of a training, or of a run, names; nothing is imported."""
    own = next((name for name in (IMAGES, AUTOENCODER) if cfg.get(name)), None)
    return own or cfg.get("family") or DIFFUSION  # runs of earlier versions have no such key


def part(cfg: DictConfig, name: str) -> ModuleType:
    """The module `run` or `task` of a family, or a user's, which is both; UserError if unknown."""
    family = str(family_of(cfg))
    if family in (*TRAINED, AUTOENCODER, IMAGES):
        return import_module(f"{HOME}{family}.{name}")
    found = None
    with suppress(ImportError, ValueError):
        found = find_spec(family)
    if found is None:
        raise UserError(
            f"family={family} is not known; it must be {', '.join(TRAINED[:-1])} or {TRAINED[-1]}, "
            "or a module of yours, as in my_package.my_family"
        )
    return import_module(family)


def require_diffusion(cfg: DictConfig) -> None:
    """Raises UserError if a configuration, or a part of it, is of another family than diffusion."""
    if (family := family_of(cfg)) != DIFFUSION:
        raise UserError(
            f"family={family} has no noise levels, which this command needs; write family=diffusion"
        )
    if "denoiser" in cfg and cfg.denoiser is None:  # as in the other families
        raise replaced("denoiser", None)
    for group in ("backbone", "objective", "sampler", "guidance"):
        target = str(OmegaConf.select(cfg, f"{group}._target_"))
        if target.startswith(HOME):
            raise UserError(
                f"{group}={target.rpartition('.')[2]} is no part of a diffusion model; choose "
                f"another {group}, or the family that it is of with family=..."
            )
