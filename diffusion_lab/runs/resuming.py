"""The configuration that a run is resumed with."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.config_keys import KEYS, Means, as_path, is_resumable
from diffusion_lab.build.overrides import parse
from diffusion_lab.common.errors import UserError
from diffusion_lab.runs import checkpoints, weights
from diffusion_lab.runs.config import load_config
from diffusion_lab.runs.folder import load_summary
from diffusion_lab.runs.opening import kind_of

# values to write instead of options, of which a resumed run keeps its own
INSTEAD_OF_OPTIONS = {
    "trainer=cpu": "trainer.accelerator=cpu",
    "trainer=ddp": "trainer.strategy=ddp",
    "trainer=fsdp": "trainer.strategy={_target_:diffusion_lab.compute.sharding.FSDP}",
}


def resumed(folder: str, overrides: list[str], command: str) -> DictConfig:
    """The configuration with which `command` resumes a run; `overrides` replace its values.

    Raises UserError for an override that would make it another model.
    """
    cfg = load_config(folder)
    kind = kind_of(cfg)
    if command != kind.command:
        raise UserError(
            f"{folder} was not made by {command}; write diffusion-lab {kind.command} "
            f"resume={folder}"
        )
    if (Path(folder) / weights.EXPORTED).is_file():
        raise UserError(
            f"{folder} is an export, which cannot be trained on; go on with the run that it came "
            "from, by resume= and that run's folder"
        )
    if not checkpoints.exists(folder):
        raise UserError(
            f"{folder} has no {checkpoints.LAST} to go on from; delete the folder and start the "
            "run anew"
        )
    summary = load_summary(folder)
    longer = any(o.startswith(("trainer.max_steps=", "trainer.max_time=")) for o in overrides)
    if summary.get("finished") and not longer and kind.is_complete(Path(folder)):
        raise UserError(
            f"{folder} is finished; write trainer.max_steps above {summary['steps']} (and a longer "
            f"trainer.max_time if it has one) to train it longer"
        )
    for override, parsed in zip(overrides, parse(overrides), strict=True):
        key = parsed.key_or_group
        if key == "resume":
            continue
        if instead := INSTEAD_OF_OPTIONS.get(override):
            raise UserError(f"{override} cannot be written in resuming a run; write {instead}")
        if not is_resumable(key):
            rows = [row for row in KEYS if Means.RESUMABLE in KEYS[row]]
            whole = tuple(row for row in rows if row.endswith(".") and row.count(".") == 1)
            others = [row for row in rows if not row.startswith(whole)]
            raise UserError(
                f"{override.lstrip('+')} cannot change in a run that is resumed; only values of "
                f"{', '.join([*whole, *others])} can, as in trainer.max_steps=20000"
            )
        OmegaConf.update(cfg, key, as_path(key, parsed.value()))
    cfg.resume = str(folder)
    return cfg


def restarted(folder: Path) -> DictConfig:
    """The configuration with which a requeued job resumes the run that it has begun.

    A job that was ended before the first checkpoint begins again in the same folder.
    """
    cfg = load_config(folder)
    cfg.resume = str(folder)
    return cfg
