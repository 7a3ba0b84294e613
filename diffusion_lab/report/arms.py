"""Arms of a comparison: runs that differ only in their seed, named by as few settings as possible.

A study gives its arms names; other runs are named by the settings in which they differ.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly import config_keys
from diffusion_lab.assembly.config_keys import CLASS, DATA_SIZE, SUBSET_SEED, Settings
from diffusion_lab.report.records import Run, whole
from diffusion_lab.report.words import Fact
from diffusion_lab.runs.results import IMAGES, OWN

PACKAGE = Path(__file__).parents[1]
WEIGHTS = ("init_sha256", "objective.teacher.sha256")  # checksums of what a run starts from
BETWEEN = " \N{MIDDLE DOT} "  # separates the settings in a name
ALL = "all runs"
SIZE = "training_images"
CHECKSUM = re.compile("[0-9a-f]{64}")  # a sha256
SHOWN = 12  # characters of a checksum in a name
HEADS = "backbone.heads"  # they follow from a width that a budget finds, and say less
# the same networks have the same colours on every page; other arms take those that are left
COLOUR_OF = {"UNet": 0, "U-Net": 0, "DiT": 1, "Mamba2": 2, "Mamba-2": 2}


@dataclass(frozen=True)
class Arm:
    """The runs of one arm, by seed; `settings` are the ones that differ between arms."""

    name: str
    settings: Settings
    runs: tuple[Run, ...]
    line: str = ""  # its name without the part of the data
    data: str = ""  # the number of training images, as text, if arms differ in it
    colour: int = 0

    @property
    def drawn_elsewhere(self) -> bool:
        return self.runs[0].drawn_elsewhere

    @property
    def data_size(self) -> tuple[object, ...]:
        """The values of the settings that choose the part of the training data."""
        return tuple(self.runs[0].settings.get(key) for key in DATA_SIZE)

    def fact(self, name: str) -> float | None:
        """The mean of a number in the summaries of its runs; None if none has it."""
        known = [each for run in self.runs if (each := getattr(run.summary, name)) is not None]
        return sum(known) / len(known) if known else None


def runs_of(arms: Iterable[Arm]) -> list[Run]:
    return [run for arm in arms for run in arm.runs]


def trained(arms: Iterable[Arm]) -> list[Arm]:
    """The arms of trained runs, without images that another program drew."""
    return [arm for arm in arms if not arm.drawn_elsewhere]


def grouped(runs: Sequence[Run]) -> tuple[list[Arm], list[Fact]]:
    """The arms of runs, the smallest data first, and a fact on each run that is repeated later."""
    by_settings: dict[str, dict[int, Run]] = {}
    repeated = []
    for run, own in zip(runs, (json.dumps(s, sort_keys=True) for s in shared(runs)), strict=True):
        seeds = by_settings.setdefault(own, {})
        pair = (seeds.get(run.seed, run), run)
        older, newer = sorted(pair, key=lambda each: each.finished_at)
        if older is not newer:
            repeated.append(Fact("repeated", run=older.folder, newer=newer.folder))
        seeds[run.seed] = newer
    groups = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in by_settings.values()]
    settings: list[Settings] = [json.loads(own) for own in by_settings]
    keys = varying([own for own in settings if IMAGES not in own])
    if any(IMAGES in own for own in settings):
        keys.append(IMAGES)
    names = _names(settings, groups, keys)
    arms = [
        Arm(name, {key: own.get(key) for key in keys}, group)
        for name, own, group in zip(names, settings, groups, strict=True)
    ]
    return _by_data(arms), repeated


def _names(
    settings: Sequence[Settings], groups: Sequence[Sequence[Run]], keys: list[str]
) -> list[str]:
    """The names of groups: those of a study's arms, of other programs' images, or of settings."""
    places = [place for place, own in enumerate(settings) if IMAGES not in own]
    names = names_of([settings[place] for place in places], keys)
    if keys == [IMAGES] and places:
        names = [groups[places[0]][0].network]
    given = [{run.config.get("arm") for run in groups[place]} for place in places]
    if given and all(len(each) == 1 and None not in each for each in given):
        names = [str(*each) for each in given]
        for arm, count in Counter(names).items():
            if count > 1:  # what else differs between groups of the same arm
                same = [place for place, name in enumerate(names) if name == arm]
                own = [settings[places[place]] for place in same]
                for place, more in zip(same, names_of(own, varying(own)), strict=True):
                    names[place] = f"{arm}{BETWEEN}{more}"
    left, found = iter(names), []
    for each in settings:
        name = str(each[IMAGES]) if IMAGES in each else next(left)
        found.append(f"{name} (images)" if IMAGES in each and name in names else name)
    return found


def _by_data(arms: Sequence[Arm]) -> list[Arm]:
    """The arms by the size of their data, the smallest first, with their lines and colours."""
    parts = {arm.data_size: "" for arm in arms}
    images = {
        part: next((n for arm in arms if arm.data_size == part and (n := arm.fact(SIZE))), 0)
        for part in parts
    }
    lines = {arm.name: without_data(arm.name) if len(parts) > 1 else arm.name for arm in arms}
    for part in parts if len(parts) > 1 else ():
        parts[part] = f"{images[part]:,.0f}" if images[part] else "unknown"
        if [*images.values()].count(images[part]) > 1:
            pairs = zip(DATA_SIZE, part, strict=True)
            parts[part] += f" ({', '.join(f'{k}={v}' for k, v in pairs if v is not None)})"
    colours = {line: COLOUR_OF[line] for line in lines.values() if line in COLOUR_OF}
    left = (each for each in range(len(lines) + len(COLOUR_OF)) if each not in colours.values())
    for line in sorted({*lines.values()}):
        colours.setdefault(line, next(left))
    ordered = sorted(arms, key=lambda arm: (images[arm.data_size], str(arm.data_size)))
    found = []
    for arm in ordered if len(parts) > 1 else arms:
        line, data = lines[arm.name], parts[arm.data_size]
        found.append(replace(arm, line=line, data=data, colour=colours[line]))
    return found


def shared(runs: Sequence[Run]) -> list[Settings]:
    """The settings of each run, with OWN for what each seed of an arm has for itself.

    That is the choice of training images, if it is by each seed of an arm, and the weights that a
    run starts from or learns from, if no two seeds of an arm have the same. A key that is newer
    than a run has the default of its class.
    """
    found = [dict(run.settings) for run in runs]
    keys = {key for own in found for key in own}
    for run, own in zip(runs, found, strict=True):
        for key in keys - own.keys():
            parent, _, name = key.rpartition(".")
            part = OmegaConf.select(run.config, parent) if parent else None
            if isinstance(part, DictConfig) and CLASS in part and name not in part:
                value = _default(part[CLASS], name)
                own |= {} if value is None else {key: whole(value)}
        if own.get(config_keys.FRACTION) == 1 and config_keys.PER_CLASS not in own:
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


def _alike(settings: Sequence[Settings], keys: Sequence[str]) -> list[list[int]]:
    """The places of settings that differ in `keys` at most."""
    alike: dict[str, list[int]] = {}
    for place, own in enumerate(settings):
        rest = json.dumps(own | dict.fromkeys(keys), sort_keys=True)
        alike.setdefault(rest, []).append(place)
    return list(alike.values())


@cache
def _tree(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


@cache
def _default(target: str, name: str) -> object:
    """The default of a class's argument, read from source without imports; None without."""
    module, _, kind = target.rpartition(".")
    path = PACKAGE.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_relative_to(PACKAGE) or not path.is_file():
        return None
    for node in _tree(path):
        if isinstance(node, ast.ImportFrom) and any(kind == each.name for each in node.names):
            return _default(f"{node.module}.{kind}", name)
        if isinstance(node, ast.ClassDef) and node.name == kind:
            found: dict[str, ast.expr | None] = {}
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and each.value:  # a field of a dataclass
                    found[ast.unparse(each.target)] = each.value
                if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                    pairs = zip(each.args.args[::-1], each.args.defaults[::-1], strict=False)
                    found = {argument.arg: default for argument, default in pairs}
            if value := found.get(name):
                with suppress(ValueError):  # of an expression
                    plain = ast.literal_eval(value)
                    return [*plain] if isinstance(plain, tuple) else plain
            bases = [each.id for each in node.bases if isinstance(each, ast.Name)]
            return None if found or not bases else _default(f"{module}.{bases[0]}", name)
    return None


def varying(settings: Sequence[Settings]) -> list[str]:
    """The keys whose values differ: classes first, keys by their nesting, heads last."""
    keys = {key for each in settings for key in each}
    found = [key for key in keys if len({_word(each.get(key)) for each in settings}) > 1]
    return sorted(found, key=lambda k: (not k.endswith(CLASS), k == HEADS, k.count("."), k))


def names_of(settings: Sequence[Settings], keys: Sequence[str]) -> list[str]:
    """A name for each of `settings`, made of the first of `keys` that distinguish all of them."""
    chosen: list[str] = []
    distinct = 1
    for key in keys:
        parts = {tuple(_word(each.get(k)) for k in [*chosen, key]) for each in settings}
        if len(parts) > distinct:
            distinct = len(parts)
            chosen.append(key)
    last, names = Counter(map(_shortest, chosen)), []
    for own in settings:
        needed = (key for key in chosen if not _determined(key, own, settings, chosen))
        names.append(BETWEEN.join(filter(None, (part(key, own, last) for key in needed))))
    # a name must say more than the size of the data, unless nothing else differs
    nameless = sum(without_data(name) == ALL for name in names)
    if len(set(names)) == len(names) and all(names) and nameless in (0, len(names)):
        return names
    if not chosen:
        return [ALL] * len(settings)
    words = [[_spelled(key, each) for key in chosen] for each in settings]
    if len(set(map(tuple, words))) < len(words):  # classes of one name in two modules
        words = [[f"{key}={_word(each.get(key))}" for key in chosen] for each in settings]
    return [BETWEEN.join(own) for own in words]


def _spelled(key: str, settings: Settings) -> str:
    """A key and its value, of a class as one writes it: coupling=OptimalTransport, or none."""
    value = settings.get(key)
    if key.endswith(CLASS):
        kind = "none" if value is None else str(value).rpartition(".")[2]
        return f"{key.removesuffix(f'.{CLASS}')}={kind}"
    return f"{key}={_word(value)}"


def _determined(key: str, own: Settings, settings: Sequence[Settings], keys: Sequence[str]) -> bool:
    """Whether the class of a part, such as backbone, determines the part's key."""
    kind = f"{key.partition('.')[0]}.{CLASS}"
    alike = [each for each in settings if each.get(kind) == own.get(kind)]
    return kind in keys and kind != key and len({_word(each.get(key)) for each in alike}) == 1


def part(key: str, settings: Settings, last: Counter) -> str | None:
    """The part of a name for a key: the class, the key of what is true, or key and value."""
    value, short = settings.get(key), _shortest(key)
    if value is None:
        return f"{short}=null" if key in DATA_SIZE else None
    if key.endswith(CLASS):
        return str(value).rpartition(".")[2]
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
    """An arm's name without the settings that choose the part of the data."""
    words = [_shortest(key) for key in DATA_SIZE]
    parts = name.split(BETWEEN)
    kept = [part for part in parts if _shortest(part.partition("=")[0]) not in words]
    return BETWEEN.join(kept) or ALL
