"""Groups of runs that differ only in their seed, named by as few settings as possible."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import product

from scipy import stats

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.build.config_keys import CLASS, DATA_SIZE, SUBSET_SEED, Settings
from diffusion_lab.metrics.metric import REAL
from diffusion_lab.runs.samplings import IMAGES, OWN

LEVEL = 0.05  # significance level of every test and interval
BETWEEN = " \N{MIDDLE DOT} "  # separates the settings in a name
ALL = "all runs"
WEIGHTS = ("init_sha256", "objective.teacher.sha256")  # checksums of what a run starts from
CHECKSUM = re.compile("[0-9a-f]{64}")  # a sha256
SHOWN = 12  # characters of a checksum in a name


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

    def of_seeds(self, seeds: Container[int]) -> "Group":
        """The group with the runs of these seeds, or as it is if it has none of them."""
        runs = tuple(run for run in self.runs if run.seed in seeds)
        return replace(self, runs=runs or self.runs)

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
    if keys == [IMAGES] and ours:
        names = [str(ours[0].get("backbone._target_")).rpartition(".")[2]]
    left = iter(names)
    return [
        Group(_given(own, names) or next(left), {key: own.get(key) for key in keys}, group)
        for own, group in zip(settings, groups, strict=True)
    ], left_out


def _given(own: Settings, names: Container[str]) -> str:
    """The name of another program's images, unlike those of runs; empty for a run's settings."""
    name = str(own.get(IMAGES, ""))
    return f"{name} (images)" if name in names else name


def shared(runs: Sequence[Run]) -> list[Settings]:
    """The settings of each run, with OWN for what each seed of a composition has for itself.

    That is the choice of training images, if every run makes it by its own seed, and the weights
    that a run starts from or learns from, if no two seeds of a composition have the same.
    """
    by_seed = choose_images_by_seed([run for run in runs if not run.drawn_elsewhere])
    found: list[Settings] = [run.settings | ({SUBSET_SEED: OWN} if by_seed else {}) for run in runs]
    alike: dict[str, list[int]] = {}  # places of runs that differ in their weights at most
    for place, own in enumerate(found):
        rest = json.dumps(own | dict.fromkeys(WEIGHTS), sort_keys=True)
        alike.setdefault(rest, []).append(place)
    for key, places in product(WEIGHTS, alike.values()):
        pairs = {(runs[place].seed, found[place].get(key)) for place in places}
        seeds, weights = (set(each) for each in zip(*pairs, strict=True))
        if len(pairs) == len(seeds) == len(weights) > 1 and None not in weights:
            for place in places:
                found[place][key] = OWN
    return found


def choose_images_by_seed(runs: Sequence[Run]) -> bool:
    """Whether runs of several seeds each trained on the subset that its own seed chooses."""
    own = all(run.settings.get(SUBSET_SEED) == run.seed for run in runs)
    return own and len({run.seed for run in runs}) > 1


def varying(settings: list[Settings]) -> list[str]:
    """The keys whose values differ: classes first, then keys by the depth of their nesting."""
    keys = {key for each in settings for key in each}
    found = [key for key in keys if len({_word(each.get(key)) for each in settings}) > 1]
    return sorted(found, key=lambda key: (not key.endswith(CLASS), key.count("."), key))


def names_of(settings: list[Settings], keys: list[str]) -> list[str]:
    """A name for each of `settings`, made of the first of `keys` that distinguish all of them."""
    chosen: list[str] = []
    distinct = 1
    for key in keys:
        parts = {tuple(_word(each.get(k)) for k in [*chosen, key]) for each in settings}
        if len(parts) > distinct:
            distinct = len(parts)
            chosen.append(key)
    last = Counter(_shortest(key) for key in chosen)
    names = [
        BETWEEN.join(
            filter(None, (part(key, each, last) for key in _needed(each, settings, chosen)))
        )
        for each in settings
    ]
    # a name must say more than the size of the data, unless nothing else differs
    nameless = sum(not _apart_from_data(name) for name in names)
    if len(set(names)) < len(names) or not all(names) or 0 < nameless < len(names):
        long = [
            BETWEEN.join(f"{key}={_word(each.get(key))}" for key in chosen) for each in settings
        ]
        return long if chosen else [ALL]
    return names


def _needed(own: Settings, settings: Sequence[Settings], keys: Sequence[str]) -> list[str]:
    """The keys without those of a part, such as backbone, that its class determines."""

    def determined(key: str) -> bool:
        kind = f"{key.partition('.')[0]}.{CLASS}"
        alike = [each for each in settings if each.get(kind) == own.get(kind)]
        return kind in keys and kind != key and len({_word(each.get(key)) for each in alike}) == 1

    return [key for key in keys if not determined(key)]


def part(key: str, settings: Settings, last: Counter) -> str | None:
    """The part of a name for a key: the class, or the last part of the key and its value.

    A setting that is true is named by its key, and left out where it is false.
    """
    value = settings.get(key)
    if value is None:
        return f"{_shortest(key)}=null" if key in DATA_SIZE else None
    if key.endswith(CLASS):
        return str(value).rpartition(".")[2]
    short = _shortest(key)
    name = key if last[short] > 1 else short
    if isinstance(value, bool):
        return name if value else None
    return f"{name}={_word(value)}"


def _shortest(key: str) -> str:
    return key.rpartition(".")[2]


def _word(value: object) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    return value[:SHOWN] if CHECKSUM.fullmatch(value) else value


def without_data(name: str) -> str:
    """A group's name without the settings that choose the part of the data."""
    return BETWEEN.join(_apart_from_data(name)) or ALL


def _apart_from_data(name: str) -> list[str]:
    words = [_shortest(key) for key in DATA_SIZE]
    return [part for part in name.split(BETWEEN) if _shortest(part.partition("=")[0]) not in words]
