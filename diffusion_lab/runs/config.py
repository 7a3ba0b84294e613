"""The configuration that a run folder keeps."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.common.errors import UserError
from diffusion_lab.common.files import OUTPUTS, write_atomically
from diffusion_lab.compute.distributed import rank_and_world
from diffusion_lab.first_stage import hub
from diffusion_lab.runs import targets
from diffusion_lab.runs.folder import CONFIG


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes the configuration, every interpolation resolved, on rank 0."""
    if rank_and_world()[0] == 0:
        write_atomically(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))


def load_config(folder: str | Path) -> DictConfig:
    """The configuration of a run; raises UserError where there is no run.

    Warns of classes that no installation of this program has.
    """
    folder = Path(str(folder))  # a folder 2024 is a number to Hydra
    if not (folder / CONFIG).is_file():
        known = sorted(str(path.parent) for path in OUTPUTS.glob(f"*/*/{CONFIG}"))
        hint = f"; the latest here is {known[-1]}" if known else ""
        raise UserError(
            f"{folder} is no run folder, it has no {CONFIG}; give a folder that train made{hint}"
        )
    try:
        cfg = OmegaConf.load(folder / CONFIG)
        OmegaConf.set_struct(cfg, True)
        if "run" in cfg.get("first_stage", {}):
            cfg.first_stage.run = str(folder)  # its own copy, wherever it now is
        if "path" in cfg.get("first_stage", {}):
            cfg.first_stage.path = str(folder / hub.COPY_FOLDER)
    except Exception as error:  # YAML's errors and OmegaConf's have no common name
        raise UserError(f"{folder / CONFIG} is damaged and cannot be read") from error
    targets.check(cfg, folder / CONFIG)
    return cfg
