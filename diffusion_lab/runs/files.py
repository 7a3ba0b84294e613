"""The files of a run folder, and the reading of two of them, for which torch is not needed."""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from diffusion_lab.build.config_keys import verbatim
from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import kinds

CONFIG, SUMMARY, METRICS, SAMPLES = "config.yaml", "summary.json", "metrics.jsonl", "samples"
LAST = Path("checkpoints/last.ckpt")


def load_summary(folder: str | Path) -> dict:
    """The summary.json of a run; an empty dictionary if it is missing or damaged."""
    found = read_json(Path(folder) / SUMMARY)
    return found if kinds.is_record(found) else {}


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
