"""The runs that a W&B project has, as their folders here describe them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from omegaconf import OmegaConf

from diffusion_lab.build.config_keys import Settings, flat
from diffusion_lab.build.sentences import did_you_mean
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Range
from diffusion_lab.report.records import run_folders
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.summary import load_summary

GROUPS = ("backbone", "conditioning", "schedule", "objective", "sampler", "guidance", "data")
PROTOCOL = Range(
    "the part of a metric's name after fid/",
    lambda value: bool(re.fullmatch(r"[\w.-]+/[\w.-]+-\w+", str(value))),
    "efficientnet_lite0-96/train60k-5k",
)


@dataclass(frozen=True)
class LoggedRun:
    """A run that was logged to W&B, as its folder has it: its settings and its final metrics."""

    settings: Settings
    metrics: dict[str, float]


def logged_runs(paths: Sequence[str], project: str, group: str | None) -> Iterator[LoggedRun]:
    """Yields the runs at or below the paths, or in outputs/, that a W&B project, or group, has."""
    if not paths and not any(OUTPUTS.glob(f"*/*/{CONFIG}")):
        return
    for folder in run_folders(paths or [OUTPUTS]):
        with suppress(UserError):  # of another version, for example
            config = load_config(folder)
            place = (config.get("logger") or {}).get("wandb")
            if place and place.project == project and group in (None, place.get("group")):
                settings = flat(OmegaConf.to_container(config))
                yield LoggedRun(settings, load_summary(folder).metrics)


def protocol_of(runs: Sequence[LoggedRun], project: str) -> str:
    """The one protocol by which runs were measured, as it is in the names of their metrics."""
    fids = {name for run in runs for name in run.metrics if name.startswith("fid/")}
    protocols = sorted(name.removeprefix("fid/") for name in fids)
    if not protocols:
        raise UserError(
            f"no run of project={project} with FID was found; give the folders of its runs, or "
            f"write the part of a metric's name after fid/, as in protocol={PROTOCOL.example}"
        )
    if len(protocols) > 1:
        raise UserError(
            f"the runs were measured by {' and by '.join(protocols)}; choose one by protocol=..., "
            "or give the folders of some runs"
        )
    return protocols[0]


def key_of(name: str, runs: Sequence[LoggedRun]) -> str:
    """The key in a run's configuration of an option or a value, such as backbone or seed."""
    key, option = name, f"choices.{name.replace('/', '_')}"
    found = {each for run in runs for each in run.settings}
    if option in found or (not runs and name in GROUPS):
        return option
    if runs and key not in found:
        near = did_you_mean(name, sorted(found))
        raise UserError(
            f"group_by={name} is not a key of these runs; {near}use options and keys of their "
            "config.yaml, as in group_by=[backbone,data.fraction]"
        )
    return key
