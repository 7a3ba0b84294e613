"""The configuration that a run folder keeps."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import diffusion_lab
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.files import OUTPUTS, write_atomically
from diffusion_lab.compute.distributed import rank_and_world
from diffusion_lab.first_stage import hub
from diffusion_lab.runs import trusted_targets
from diffusion_lab.runs.folder import CONFIG

FORMAT = 2  # of run folders and exports; raised when programs before could not read them
WRITTEN_BY = "written_by"  # the key of the format and the version, above those of the configuration


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes the configuration, every interpolation resolved, on rank 0."""
    if rank_and_world()[0] == 0:
        written_by = {WRITTEN_BY: {"format": FORMAT, "version": diffusion_lab.__version__}}
        text = OmegaConf.to_yaml(written_by) + OmegaConf.to_yaml(cfg, resolve=True)
        write_atomically(folder / CONFIG, text)


def load_config(folder: str | Path) -> DictConfig:
    """The configuration of a run; raises UserError if there is no run, or one of another format.

    Warns of classes that no installation of this program has.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        known = sorted(str(path.parent) for path in OUTPUTS.glob(f"*/*/{CONFIG}"))
        hint = f"; the latest here is {known[-1]}" if known else ""
        raise UserError(
            f"{folder} is no run folder, it has no {CONFIG}; give a folder that train made{hint}"
        )
    try:
        cfg = OmegaConf.load(folder / CONFIG)
        assert isinstance(cfg, DictConfig), "a mapping"
        written_by = cfg.pop(WRITTEN_BY, {})
    except Exception as error:  # YAML's errors and OmegaConf's have no common name
        raise UserError(f"{folder / CONFIG} is damaged and cannot be read") from error
    _require_format(folder, written_by)
    OmegaConf.set_struct(cfg, True)
    first_stage = cfg.get("first_stage", {})  # which an autoencoder's run does not have
    if "run" in first_stage:
        first_stage.run = str(folder)  # its own copy, wherever it now is
    if "path" in first_stage:
        first_stage.path = str(folder / hub.COPY_FOLDER)
    trusted_targets.check(cfg, folder / CONFIG)
    return cfg


def _require_format(folder: Path, written_by: DictConfig | dict) -> None:
    if written_by.get("format") != FORMAT:
        version = written_by.get("version", "0.1")
        raise UserError(
            f"{folder} was written by diffusion-lab {version}, and this is diffusion-lab "
            f"{diffusion_lab.__version__}, which cannot read its format; open it with "
            f"diffusion-lab {version}"
        )
