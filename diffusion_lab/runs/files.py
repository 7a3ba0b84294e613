"""The files of a run folder, and the reading of its configuration, which does not need torch."""

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

import diffusion_lab
from diffusion_lab.assembly.config_keys import CLASS, KEYS, verbatim
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import migrate

# in summaries and evaluations, besides null; their metrics are numbers
RECORDED: dict[str, Any] = {
    "name ended_at git_commit device precision checkpoint": str,
    "steps images_seen began_from_images began_from_flops first_stage_seconds": int | float,
    "wall_seconds training_seconds sampling_seconds parameters training_images": int | float,
    "macs peak_memory_bytes forward_passes teacher_images teacher_calls": int | float,
    "metrics protocol sampling versions": dict,
    "at_other_steps extra_quantities overrides": list,
}
# in configurations, besides null
CONFIGURED: dict[str, Any] = {
    **{row[:-1]: DictConfig for row in KEYS if row.endswith(".") and row.count(".") == 1},
    "written_by protocol data.source": DictConfig,
    f"name family data.source.{CLASS}": str,
    "seed": int,
    "budget.seconds": int | float,
    "denoiser.self_conditioning": bool,
}


def is_record(found: object) -> bool:
    """Whether a summary or an evaluation has values of the kinds that this program writes."""
    if not isinstance(found, dict):
        return False
    known = ((found.get(key), kind) for keys, kind in RECORDED.items() for key in keys.split())
    if not all(value is None or isinstance(value, kind) for value, kind in known):
        return False
    metrics, protocol = found.get("metrics") or {}, found.get("protocol")
    return (
        all(isinstance(value, int | float) for value in metrics.values())
        and (not protocol or isinstance(protocol.get("num_samples"), int))
        and all(map(is_record, found.get("at_other_steps") or []))
        and all(isinstance(each, dict) for each in found.get("extra_quantities") or [])
    )


CONFIG, SUMMARY, METRICS, SAMPLES = "config.yaml", "summary.json", "metrics.jsonl", "samples"
NON_FINITE = "non_finite"  # a folder on the steps that ended a run, or took it back
COLLAPSED = "collapse.json"  # why a run ended whose samples became alike
LAST, PREVIOUS = Path("checkpoints/last.ckpt"), Path("checkpoints/previous.ckpt")
FORMAT = 4  # format of run folders and exports; raise it if older versions could not read them
WRITTEN_BY = "written_by"  # the key of the format and the version, before the configuration's keys
DIRTY = "-dirty"  # ends the commit of a checkout with uncommitted changes
LOOP = "sample.py"  # of an export for diffusers, and how it begins
LOOP_BEGINS = '"""Draws samples with diffusers: python sample.py"""'


class Loader(yaml.CSafeLoader):
    """Reads YAML as OmegaConf 2.3 does, on the parser in C, which is seven times as fast.

    A date is a text, 1e-3 is a number, and a key may not stand twice in a mapping.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's way
        first: [(tag, rule) for tag, rule in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if len(set(names)) < len(names):
            raise ValueError("a key stands twice in a mapping")
        return super().construct_mapping(node, deep)


EXPONENTIAL = re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENTIAL, list("-+0123456789"))


def read_config(folder: Path) -> DictConfig:
    """Reads the configuration of a run of any format as it is; its texts are never resolved.

    Raises UserError if it is damaged.
    """
    path = folder / CONFIG
    try:
        cfg = DictConfig(dict(verbatim(yaml.load(path.read_text(), Loader))))
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except Exception as error:  # the errors of YAML and OmegaConf share no class
        raise UserError(f"{path} is damaged and cannot be read; put back a copy of it") from error
    for keys, kind in CONFIGURED.items():
        for key in keys.split():
            value = OmegaConf.select(cfg, key)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"{path} is damaged: its value of {key} is of a wrong kind")
    return cfg


def load_record(folder: str | Path) -> DictConfig:
    """Reads the configuration of a run, of which nothing may be built before its classes are known.

    Raises UserError if it is missing or of another format.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        inside = [*folder.glob(f"*/{CONFIG}")] or OUTPUTS.glob(f"*/*/{CONFIG}")
        known = sorted(str(path.parent) for path in inside if "pretrained" not in path.parts)
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
