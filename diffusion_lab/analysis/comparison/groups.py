"""Groups of runs that differ only in their seed, named by as few settings as possible."""

import inspect
import json
import statistics
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from scipy import stats

from diffusion_lab.analysis.comparison.candidates import Run, whole
from diffusion_lab.analysis.comparison.names import names_of, varying
from diffusion_lab.build.config_keys import (
    CLASS,
    DATA_SIZE,
    FRACTION,
    PER_CLASS,
    SUBSET_SEED,
    Settings,
)
from diffusion_lab.metrics.metric import REAL
from diffusion_lab.runs.samplings import IMAGES, OWN

LEVEL = 0.05  # significance level of every test and interval
WEIGHTS = ("init_sha256", "objective.teacher.sha256")  # checksums of what a run starts from


def half_width(values: Sequence[float]) -> float:
    """Half the width of the confidence interval of the mean of two or more values."""
    if len(set(values)) == 1:
        return 0.0  # not the rounding of their mean
    return float(stats.t.isf(LEVEL / 2, len(values) - 1) * stats.sem(values))


@dataclass(frozen=True)
class Group:
    """The runs of one composition, by seed; `settings` are the ones that differ between groups."""

    name: str
    settings: Settings
    runs: tuple[Run, ...]
    look: int = 0  # the index of its colour and marker

    def by_seed(self, kind: str) -> dict[int, float]:
        """The values of a metric or cost, by seed."""
        return {run.seed: run.values[kind] for run in self.runs if kind in run.values}

    def values(self, kind: str) -> list[float]:
        """The values of a metric or cost, one for each seed that has it."""
        return list(self.by_seed(kind).values())

    def mean(self, kind: str) -> float:
        """The mean over seeds, at least one of which must have a value."""
        return statistics.mean(self.values(kind))

    def half_width(self, kind: str) -> float | None:
        """Half the width of the mean's 95 % confidence interval; None for under two values."""
        values = self.values(kind)
        return half_width(values) if len(values) > 1 else None

    @property
    def drawn_elsewhere(self) -> bool:
        """Whether the group has images that another program drew."""
        return self.runs[0].drawn_elsewhere

    @property
    def jackknife(self) -> float | None:
        """The jackknife standard deviation of FID over samples; None if there are several seeds."""
        return self.runs[0].values.get("fid_std") if len(self.runs) == 1 else None

    @property
    def apart_from_data(self) -> str:
        """The settings that differ between groups, except the part of the data, as JSON text."""
        rest = {key: value for key, value in self.settings.items() if key not in DATA_SIZE}
        return json.dumps(rest, sort_keys=True)

    @property
    def data_size(self) -> tuple[object, ...]:
        """The values of the settings that choose the part of the training data."""
        return tuple(self.runs[0].settings.get(key) for key in DATA_SIZE)


def runs_of(groups: Sequence[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs]


def of_seeds(groups: Sequence[Group], seeds: Container[int]) -> list[Group]:
    """The groups with the runs of these seeds alone; as they are if no run has one of them."""
    own = [replace(g, runs=tuple(run for run in g.runs if run.seed in seeds)) for g in groups]
    return [group for group in own if group.runs] or list(groups)


def trained(groups: Sequence[Group]) -> list[Group]:
    """The groups of trained runs, without images that another program drew."""
    return [group for group in groups if not group.drawn_elsewhere]


def real_value(groups: Sequence[Group], kind: str) -> float | None:
    """The value of a metric for real images in place of samples; None if it was not measured."""
    return next((value for group in groups for value in group.values(f"{kind}{REAL}")), None)


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups runs by composition; also returns a sentence on each run that a later one repeats.

    A group is named by the fewest settings that distinguish it from the others, classes first;
    images that another program drew have their own name. What differs by the seed alone is no
    setting, as `shared` says.
    """
    by_composition: dict[str, dict[int, Run]] = {}
    left_out = []
    compositions = [json.dumps(own, sort_keys=True) for own in shared(runs)]
    for run, composition in zip(runs, compositions, strict=True):
        seeds = by_composition.setdefault(composition, {})
        pair = (seeds.get(run.seed, run), run)
        older, newer = sorted(pair, key=lambda each: each.finished_at)
        if older is not newer:
            left_out.append(
                f"{older.folder} is left out: {newer.folder}, which finished later, has "
                "the same composition and the same seed"
            )
        seeds[run.seed] = newer
    groups = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in by_composition.values()]
    settings: list[Settings] = [json.loads(composition) for composition in by_composition]
    ours = [own for own in settings if IMAGES not in own]
    keys = varying(ours) + [IMAGES] * (len(ours) < len(settings))
    names = names_of(ours, keys)
    names = arms_of(
        [g for g, own in zip(groups, settings, strict=True) if IMAGES not in own], names
    )
    if keys == [IMAGES] and ours:
        names = [str(ours[0].get("backbone._target_")).rpartition(".")[2]]
    left = iter(names)
    return [
        Group(_given(own, names) or next(left), {key: own.get(key) for key in keys}, group)
        for own, group in zip(settings, groups, strict=True)
    ], left_out


def arms_of(groups: Sequence[Sequence[Run]], names: list[str]) -> list[str]:
    """The names that a study gives to its arms, if each group is one of them; else `names`."""
    given = [{run.config.get("arm") for run in group} for group in groups]
    arms = [next(iter(each)) for each in given if len(each) == 1]
    return arms if None not in arms and len(set(arms)) == len(groups) else names


def _given(own: Settings, names: Container[str]) -> str:
    """The name of another program's images, unlike those of runs; empty for a run's settings."""
    name = str(own.get(IMAGES, ""))
    return f"{name} (images)" if name in names else name


def shared(runs: Sequence[Run]) -> list[Settings]:
    """The settings of each run, with OWN for what each seed of a composition has for itself.

    That is the choice of training images, if it is by each seed of a composition, and the weights
    that a run starts from or learns from, if no two seeds of a composition have the same. A key
    that is newer than a run has the default with which the run would be opened.
    """
    found = [dict(run.settings) for run in runs]
    keys = {key for own in found for key in own}
    for run, own in zip(runs, found, strict=True):
        own.update(_defaults(run, keys - own.keys()))
    for own in found:
        if own.get(FRACTION) == 1 and PER_CLASS not in own:
            own.pop(SUBSET_SEED, None)  # all images leave no choice
    by_seed = [
        places
        for places in _alike(found, (SUBSET_SEED, *WEIGHTS))
        if all(found[place].get(SUBSET_SEED) == runs[place].seed for place in places)
    ]
    if any(len({runs[place].seed for place in places}) > 1 for places in by_seed):
        for place in chain(*by_seed):
            found[place][SUBSET_SEED] = OWN
    for places in _alike(found, (*DATA_SIZE, SUBSET_SEED, *WEIGHTS)):
        choices = {found[place].get(SUBSET_SEED) for place in places} - {None}
        if len(choices) == 1:  # all images are the largest part of this choice, too
            for place in places:
                found[place][SUBSET_SEED] = next(iter(choices))
    for key, places in product(WEIGHTS, _alike(found, WEIGHTS)):
        pairs = {(runs[place].seed, found[place].get(key)) for place in places}
        seeds, weights = (set(each) for each in zip(*pairs, strict=True))
        if len(pairs) == len(seeds) == len(weights) > 1 and None not in weights:
            for place in places:
                found[place][key] = OWN
    return found


def _defaults(run: Run, keys: Iterable[str]) -> Settings:
    """The values of those keys that a run's configuration leaves to its classes."""
    found: Settings = {}
    for key in keys:
        parent, _, name = key.rpartition(".")
        part = OmegaConf.select(run.config, parent) if parent else None
        if isinstance(part, DictConfig) and CLASS in part and name not in part:
            found[key] = _default(part[CLASS], name)
    return {k: whole(v) for k, v in found.items() if isinstance(v, bool | int | float | str)}


@cache
def _default(target: str, name: str) -> object:
    """The default of a class's argument; None if there is none, or the class cannot be imported."""
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except (ImportError, ValueError, TypeError):
        return None
    return parameters[name].default if name in parameters else None


def _alike(settings: Sequence[Settings], keys: Sequence[str]) -> list[list[int]]:
    """The places of settings that differ in `keys` at most."""
    alike: dict[str, list[int]] = {}
    for place, own in enumerate(settings):
        rest = json.dumps(own | dict.fromkeys(keys), sort_keys=True)
        alike.setdefault(rest, []).append(place)
    return list(alike.values())
