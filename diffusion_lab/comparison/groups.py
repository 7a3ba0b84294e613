"""Runs of one composition, seeds apart, and what compositions differ in."""

import inspect
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

from hydra.utils import get_object
from omegaconf import OmegaConf

from diffusion_lab.comparison.candidates import Run
from diffusion_lab.kept_figures import flat

# What may differ between runs of one composition: where it ran, what it was called, how it was
# watched, and the budget that its size and length follow from. Sampling is here as all runs are
# measured with one, whatever they would have chosen.
ASIDE = (
    "seed",
    "name",
    "study_name",
    "budget",
    "optimized_metric",
    "run_dir",
    "resume",
    "logger",
    "metrics",
    "sampler",
    "guidance",
    "compile",
    "channels_last",
    "micro_batch_size",
    "validate_every_n_steps",
    "callbacks.checkpoint",
    "callbacks.sample_grid",
    "callbacks.evaluation",
    "callbacks.pruning",
    "callbacks.throughput",
    "data.root",
    "data.path",
    "data.test_path",
    "data.on_device",
    "data.validation_size",
    "first_stage.run",
    "first_stage.cache",
    "first_stage.cache_dir",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.log_every_n_steps",
    "trainer.deterministic",
)
DATA_SIZE = ("data.fraction", "data.per_class")
# what makes a held-out loss the quantity that it is, apart from what is only trained with
OF_THE_LOSS = ("objective.", "schedule.", "first_stage.", "data.")
NOT_OF_THE_LOSS = (*DATA_SIZE, "data.subset_seed", "data.flip")
CLASS = "_target_"
BETWEEN = " \N{MIDDLE DOT} "  # the settings in a name
PLAIN = (bool, int, float, str)
Settings = dict[str, object]  # dotted key -> plain value


@dataclass(frozen=True)
class Member:
    """A run, its settings, and its figures by the kinds that a comparison has: "fid", "kid", ..."""

    run: Run
    settings: Settings
    figures: dict[str, float]


@dataclass(frozen=True)
class Group:
    """The runs of one composition, by seed; `settings` are those that differ between groups."""

    name: str
    settings: Settings
    members: tuple[Member, ...]

    @cached_property
    def by_seed(self) -> dict[int, Member]:
        return {member.run.seed: member for member in self.members}

    def values(self, kind: str) -> list[float]:
        """Of all seeds that have a finite one."""
        found = (member.figures.get(kind) for member in self.members)
        return [value for value in found if value is not None and math.isfinite(value)]

    def mean(self, kind: str) -> float | None:
        """Over the seeds."""
        values = self.values(kind)
        return sum(values) / len(values) if values else None

    @property
    def data_size(self) -> tuple[object, ...]:
        """Which part of the data was trained on."""
        settings = self.members[0].settings
        return tuple(settings.get(key) for key in DATA_SIZE)


def settings_of(run: Run) -> Settings:
    """What makes a run's composition; null is left out, as a run may be older than a key."""
    plain = flat(with_defaults(OmegaConf.to_container(run.config)))
    return {
        key: value
        for key, value in plain.items()
        if value is not None and not any(key == a or key.startswith(f"{a}.") for a in ASIDE)
    }


def with_defaults(plain: object) -> object:
    """A configuration with the constructors' defaults of keys that a run is older than."""
    if not isinstance(plain, dict):
        return plain
    filled = {key: with_defaults(value) for key, value in plain.items()}
    return defaults_of(str(plain[CLASS])) | filled if CLASS in plain else filled


@cache
def defaults_of(target: str) -> Settings:
    """The plain defaults of a class by its name, none if it is not here."""
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except Exception:  # somebody's network, whose file may do anything when it is imported
        return {}
    return {each.name: each.default for each in parameters if isinstance(each.default, PLAIN)}


def grouped(members: list[Member]) -> tuple[list[Group], list[str]]:
    """Groups by settings, and a sentence on each run that repeats another.

    A group is named by the fewest settings that tell it from the others, classes first.
    """
    by_composition: dict[str, dict[int, Member]] = {}
    left_out = []
    for member in members:
        key = json.dumps(member.settings, sort_keys=True)
        seeds = by_composition.setdefault(key, {})
        if (other := seeds.get(member.run.seed)) is not None:
            older, newer = sorted((other, member), key=lambda each: str(each.run.folder))
            left_out.append(
                f"{older.run.folder} is left out: {newer.run.folder} has the same composition and "
                "the same seed"
            )
            member = newer
        seeds[member.run.seed] = member
    groups = list(by_composition.values())
    settings = [next(iter(seeds.values())).settings for seeds in groups]
    keys = varying(settings)
    names = names_of(settings, keys)
    return [
        Group(
            name,
            {key: own.get(key) for key in keys},
            tuple(seeds[seed] for seed in sorted(seeds)),
        )
        for name, own, seeds in zip(names, settings, groups, strict=True)
    ], left_out


def varying(settings: list[Settings]) -> list[str]:
    """The keys whose values are not all one, classes first, then what lies higher."""
    keys = {key for each in settings for key in each}
    found = [key for key in keys if len({_word(each.get(key)) for each in settings}) > 1]
    return sorted(found, key=lambda key: (not key.endswith(CLASS), key.count("."), key))


def names_of(settings: list[Settings], keys: list[str]) -> list[str]:
    """A name for each of the settings, made of the first of `keys` that tell all apart."""
    chosen: list[str] = []
    told_apart = 1
    for key in keys:
        parts = {tuple(_word(each.get(k)) for k in [*chosen, key]) for each in settings}
        if len(parts) > told_apart:
            told_apart = len(parts)
            chosen.append(key)
    last = Counter(_shortest(key) for key in chosen)
    names = [
        BETWEEN.join(filter(None, (part(key, each, last) for key in chosen))) for each in settings
    ]
    if len(set(names)) < len(names) or not all(names):
        long = [
            BETWEEN.join(f"{key}={_word(each.get(key))}" for key in chosen) for each in settings
        ]
        return long if chosen else ["all runs"]
    return names


def part(key: str, settings: Settings, last: Counter) -> str | None:
    """What a key adds to a name: the class, or the last part of the key and its value."""
    value = settings.get(key)
    if value is None:
        return f"{_shortest(key)}=null" if key in DATA_SIZE else None
    if key.endswith(CLASS):
        return str(value).rpartition(".")[2]
    short = _shortest(key)
    return f"{key if last[short] > 1 else short}={_word(value)}"


def _shortest(key: str) -> str:
    return key.rpartition(".")[2]


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def losses_compare(runs: list[Run]) -> bool:
    """Whether the held-out losses of all runs are one quantity."""
    kinds = set()
    for run in runs:
        plain = flat(with_defaults(OmegaConf.to_container(run.config)))
        kept = {
            key: value
            for key, value in plain.items()
            if value is not None
            and key.startswith(OF_THE_LOSS)
            and key not in NOT_OF_THE_LOSS
            and (key not in ASIDE or key == "data.validation_size")
        }
        kinds.add(json.dumps(kept, sort_keys=True))
    return len(kinds) == 1
