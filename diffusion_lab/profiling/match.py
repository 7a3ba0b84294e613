"""The size at which one backbone costs what another does."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from diffusion_lab.build.config_keys import Means, groups
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.build.overrides import parse
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.formats import amount
from diffusion_lab.common.progress import console, say
from diffusion_lab.profiling.cost_meter import UNITS, CostMeter
from diffusion_lab.profiling.sizes import Sizes, resized
from diffusion_lab.profiling.timing import ALLOWED
from diffusion_lab.runs.folder import CONFIG
from diffusion_lab.runs.opening import inherit, load_diffusion_config

BOTH_SIDES = ("data", "image_shape", "num_classes")  # what a reference does not choose


@dataclass(frozen=True)
class Match:
    """The overrides of a backbone that costs what a reference does, and the costs of both."""

    overrides: list[str]
    by: str
    difference: float  # relative, in the unit `by`
    reference: dict[str, float]
    match: dict[str, float]


def match(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Prints the overrides that give the configured backbone the cost of `cfg.reference`."""
    found = find_match(cfg, overrides, HydraConfig.get().runtime.choices["backbone"])
    print(" ".join(found.overrides))
    return asdict(found)


def find_match(cfg: DictConfig, overrides: list[str], name: str) -> Match:
    """The size of backbone=`name` that costs what `cfg.reference` does.

    `overrides` are those that `cfg`, a configuration of the command match, was composed from.
    Raises UserError if no size agrees.
    """
    check(cfg)
    reference = parse_reference(cfg, overrides)
    meter = CostMeter(cfg, reference)
    size, agrees = Sizes(cfg, name, meter.cost).solve(meter.target, cfg.tolerance)
    difference = size.cost / meter.target - 1
    solved = {f"backbone.{key}": value for key, value in size.settings.items()}
    own = [o for o in overrides if key_of(o).startswith("backbone.") and key_of(o) not in solved]
    found = [f"backbone={name}", *own, *(f"{key}={value}" for key, value in solved.items())]
    if not agrees:
        wider = math.ceil(abs(difference) * 100) / 100
        hint = f", and tolerance={wider:.2f} would take it" if wider < 1 else ""
        raise UserError(
            f"no size of backbone={name} has the {cfg.by} of {cfg.reference} to "
            f"{cfg.tolerance:.3g}; the nearest, {' '.join(found)}, is {difference:+.1%} away{hint}"
        )
    matched = resized(cfg, size.settings)
    costs = meter.summary(reference), meter.summary(matched)
    if cfg.by == "step_time":
        difference = confirm(cfg, meter, matched, found)
        costs[0]["step_time"], costs[1]["step_time"] = meter.target, meter.target * (1 + difference)
    result = Match(found, cfg.by, difference, *costs)
    show(result, str(cfg.reference), name)
    return result


def check(cfg: DictConfig) -> None:
    """Raises UserError for settings that make no sense."""
    check_keys(cfg, ALLOWED)
    if cfg.by not in UNITS:
        raise UserError(f"by={cfg.by} is unknown; use one of {', '.join(UNITS)}")
    if cfg.by == "step_time" and cfg.device == "meta":
        raise UserError("by=step_time needs a device that computes; write device=auto")
    if not isinstance(cfg.tolerance, float) or not 0 < cfg.tolerance < 1:
        raise UserError(f"tolerance={cfg.tolerance} must be between 0 and 1, as in 0.02")


def key_of(override: str) -> str:
    """The configuration key of an override, as in backbone.block for backbone/block=adaln."""
    (parsed,) = parse([override])
    return parsed.key_or_group.replace("/", ".")


def parse_reference(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of `cfg.reference`: a run folder, overrides, or an option of backbone.

    All but the backbone is the same for both: that of a run is given to `cfg` too.
    """
    others = [override for override in overrides if key_of(override).split(".")[0] != "backbone"]
    text = str(cfg.reference)
    if Path(text, CONFIG).is_file() or ("/" in text and "=" not in text):
        saved = load_diffusion_config(text)
        reference = compose("match", overrides=others)
        inherit(reference, saved, groups(Means.COST), others)
        shared = tuple(group for group in groups(Means.COST) if group != "backbone")
        inherit(cfg, saved, shared, overrides)
        say(f"Both have the data, {', '.join(shared)} of {text}; train with the same")
        return reference
    for override in text.split():
        if override.split("=")[0] in BOTH_SIDES:
            raise UserError(
                f"reference={text} chooses {override}, and both sides are counted on the same "
                f"images; write {override} beside reference=..., not in it"
            )
    chosen = text.split() if "=" in text else [f"backbone={text}"]
    return compose("match", overrides=[*others, *chosen])


def confirm(cfg: DictConfig, meter: CostMeter, matched: DictConfig, found: list[str]) -> float:
    """The relative difference in time, measured anew: a search takes the luckiest of many times."""
    low, ratio, high = meter.confirm(matched)
    say(f"Measured anew: {ratio:.3f} of the time ({low:.3f} to {high:.3f})")
    if abs(ratio - 1) > cfg.tolerance:
        raise UserError(
            f"{' '.join(found)} came out nearest, but measured anew it takes {ratio:.3f} of "
            f"the reference's time ({low:.3f} to {high:.3f}); time more steps with "
            f"timed_steps={4 * cfg.timed_steps}, on a machine that does nothing else"
        )
    return ratio - 1


def show(found: Match, reference: str, name: str) -> None:
    """Prints the costs of both."""
    table = Table("", *found.match, title=f"Difference in {found.by}: {found.difference:+.2%}")
    for title, costs in ((reference, found.reference), (name, found.match)):
        table.add_row(title, *(amount(value) for value in costs.values()))
    console.print(table)
