"""The configuration that resumes a run, and how a saved run differs from the one asked for."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import KEYS, Means, as_path, flat, is_resumable, means
from diffusion_lab.assembly.sentences import parse, values_of
from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.current import EXPORTED
from diffusion_lab.runs.opened import kind_of, load_trained_config
from diffusion_lab.runs.progress import require_unlocked
from diffusion_lab.runs.summary import load_summary

# The values to set instead of choosing an option: a resumed run keeps its own options.
INSTEAD_OF_OPTIONS = {
    "trainer=cpu": "trainer.accelerator=cpu",
    "trainer=ddp": "trainer.strategy={_target_:diffusion_lab.compute.sharding.DDP}",
    "trainer=fsdp": "trainer.strategy={_target_:diffusion_lab.compute.sharding.FSDP}",
}
# Files whose checksums are in the names of metrics, so that their paths do not matter.
FILES = ("metrics.classifier",)
# Values that a run replaces: it determines the actual value and keeps that.
SOURCE = ("image_size", "channels", "classes", "label_size")
STARTS = ("data_sha256", "init_sha256", "init_images", "init_flops")
REQUESTS = {
    **dict.fromkeys([f"data.source.{key}" for key in SOURCE]),
    **dict.fromkeys(["first_stage.sha256", "objective.teacher.sha256", *STARTS]),
    "first_stage.scale": "measured",
}
# what may be changed: groups, and keys outside of them
ROWS = [row for row in KEYS if Means.RESUMABLE in KEYS[row]]
GROUPS = tuple(row for row in ROWS if row.endswith(".") and row.count(".") == 1)
RESUMABLE = [*GROUPS, *(row for row in ROWS if not row.startswith(GROUPS))]


def resumed(folder: str, overrides: list[str], command: str) -> DictConfig:
    """The configuration with which `command` resumes a run; `overrides` replace its values.

    Raises UserError if the run cannot be resumed or an override would make it another run.
    """
    cfg = load_trained_config(folder)
    require_unlocked(Path(folder))  # before advice to delete it
    kind = kind_of(cfg)
    if command != kind.command:
        raise UserError(
            f"{folder} was not made by {command}; write diffusion-lab {kind.command} "
            f"resume={folder}"
        )
    if (Path(folder) / EXPORTED).is_file():
        raise UserError(
            f"{folder} is an export, which cannot be resumed; resume the run that it was exported "
            "from"
        )
    if not checkpoints.exists(folder):
        raise UserError(
            f"{folder} has no {checkpoints.LAST} to resume from; delete the folder and start the "
            "run again"
        )
    summary = load_summary(folder)
    longer = any(o.startswith(("trainer.max_steps=", "trainer.max_time=")) for o in overrides)
    complete = all((Path(folder) / name).is_file() for name in kind.results)
    if summary.finished and not longer and complete:
        raise UserError(
            f"{folder} is finished; to train it longer, write trainer.max_steps above "
            f"{summary.steps} (and a longer trainer.max_time if it has one)"
        )
    for override, parsed in zip(overrides, parse(overrides), strict=True):
        key = parsed.key_or_group
        if key == "resume":
            continue
        if instead := INSTEAD_OF_OPTIONS.get(override):
            raise UserError(f"{override} cannot be used to resume a run; write {instead}")
        if not is_resumable(key):
            raise UserError(
                f"{override.lstrip('+')} cannot be changed when a run is resumed; only values of "
                f"{', '.join(RESUMABLE)} can, as in trainer.max_steps=20000"
            )
        OmegaConf.update(cfg, key, as_path(key, parsed.value()))
    newest = checkpoints.step_of(folder) if longer else 0  # a kill leaves an older summary, or none
    if type(asked := cfg.trainer.max_steps) is int and asked < (at := max(summary.steps, newest)):
        raise UserError(
            f"{folder} is at step {at}, beyond trainer.max_steps={asked}; write a larger number"
        )
    cfg.resume = str(folder)
    return cfg


def differences(saved: DictConfig, cfg: DictConfig) -> Iterator[tuple[str, object, object]]:
    """Yields (key, saved, requested) for settings that make `cfg` another run; missing is null."""
    known, asked = (flat(OmegaConf.to_container(each, resolve=True)) for each in (saved, cfg))
    if saved.get("budget") and cfg.get("budget"):
        solved = values_of(saved.budget.solved or [])
        asked |= {key: value for key, value in solved.items() if key in asked}
    asked |= found_out(asked)
    for key in dict.fromkeys([*asked, *known]):
        old, new = known.get(key), asked.get(key)
        left_open = key in REQUESTS and new == REQUESTS[key]
        elsewhere = key in FILES and None not in (old, new)
        if Means.IDENTITY in means(key) and old != new and not left_open and not elsewhere:
            yield key, old, new


def found_out(asked: dict[str, object]) -> dict[str, object]:
    """The values that a run would keep in place of REQUESTS, as far as the settings give them."""
    found: dict[str, object] = {}
    size = asked.get("data.source.image_size")
    if isinstance(size, int):
        found["data.source.image_size"] = [size, size]
    if size is None and "data.source.resize" in asked:
        found["data.source.resize"] = "refuse"  # no image needs resizing
    first_stage = Path(str(asked.get("first_stage.run"))) / saving.FIRST_STAGE_FILE
    if asked.get("first_stage.sha256") is None and first_stage.is_file():
        found["first_stage.sha256"] = hashing.of_file(first_stage)
    return found
