"""The files of a run folder, and the reading of its configuration, which does not need torch."""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

import diffusion_lab
from diffusion_lab.build.config_keys import verbatim
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import kinds, migrate

CONFIG, SUMMARY, METRICS, SAMPLES = "config.yaml", "summary.json", "metrics.jsonl", "samples"
LAST, PREVIOUS = Path("checkpoints/last.ckpt"), Path("checkpoints/previous.ckpt")
FORMAT = 4  # format of run folders and exports; raise it if older versions could not read them
WRITTEN_BY = "written_by"  # the key of the format and the version, before the configuration's keys
DIRTY = "-dirty"  # ends the commit of a checkout with uncommitted changes


def read_config(folder: Path) -> DictConfig:
    """Reads the configuration of a run of any format as it is; its texts are never resolved.

    Raises UserError if it is damaged.
    """
    path = folder / CONFIG
    try:
        cfg = DictConfig(verbatim(yaml.load(path.read_text(), get_yaml_loader())))
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except Exception as error:  # the errors of YAML and OmegaConf share no class
        raise UserError(f"{path} is damaged and cannot be read") from error
    if key := kinds.wrong_key(cfg):
        raise UserError(f"{path} is damaged: its value of {key} is of a wrong kind")
    return cfg


def load_record(folder: str | Path) -> DictConfig:
    """Reads the configuration of a run, of which nothing may be built before its classes are known.

    Raises UserError if it is missing or of another format.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        known = sorted(str(path.parent) for path in OUTPUTS.glob(f"*/*/{CONFIG}"))
        hint = f", such as {known[-1]}" if known else ""
        raise UserError(
            f"{folder} is not a run folder, as it has no {CONFIG}; give the folder of a run{hint}"
        )
    cfg = read_config(folder)
    written_by = cfg.pop(WRITTEN_BY, None) or {}
    if written_by.get("format") == migrate.FORMAT:
        cfg = migrate.config(cfg)
    elif written_by.get("format") != FORMAT:
        version = written_by.get("version", "0.1")
        raise UserError(
            f"{folder} was written by diffusion-lab {version} in format "
            f"{written_by.get('format', 1)} of run folders, and this version, "
            f"{diffusion_lab.__version__}, reads format {FORMAT}; open it with the version that "
            "wrote it, or train the model again"
        )
    migrate.rename_classes(cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg
