"""The file of a study: its question, protocol, arms, budget and stages, read and checked.

Settings are overrides by key, as in {optimizer.lr: 4e-3}. A stage is one command for each
combination of values on its axes: arms, seeds, axes of the study, or any key with its values.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from diffusion_lab.assembly.sentences import conf_dir, instead, require, sentence
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import FOLDER, Range, above, numbers, optional, whole
from diffusion_lab.metrics.quantity import OF_SAMPLES, VALIDATION, higher_is_better, quantity_of

SEVERAL = numbers("several numbers", lambda values: len(values) > 1)
ARMS, SEEDS, SAMPLING_SEEDS = "arms", "seeds", "sampling_seeds"
TRAINS = ("train", "train-autoencoder")
ON_RUNS = ("sample-sweep", "evaluate", "memorization")  # of one trained run each
ON_FOLDERS = ("compare", "publish")  # of all runs of the stages that they need
STAGE_COMMANDS = (*TRAINS, "train-extractor", *ON_RUNS, *ON_FOLDERS)
LENGTHS = ("images", "seconds", "flops")  # units of a budget, of which one counts
KEYS = ("base", "name", "question", "protocol", "common", "axes", "arms", "budget", "stages")
BUDGET = ("match", "reference", "tolerance", *LENGTHS)
PROTOCOL = ("metric", "test", "contrasts", "seeds", SAMPLING_SEEDS, "stop", "sampling")
CHOOSING = ("choose", "grow", "trials", "measure", "num_samples")  # keys of a stage that tunes
STAGE = ("over", "of", "needs", "share", "seeds", "question", "protocol", *LENGTHS, *CHOOSING)
NEED = ("stage", "other")
OWN_FOLDERS = ("jobs", "logs", "submitted", "sweeps")  # of a study, beside those of its stages
DEPTHS = {"stages": 2, "arms": 2, "axes": 3}  # of the mappings above a setting
TUNING_SEEDS = [100]  # as no seed of a study

Settings = dict[str, Any]
Axis = dict[str, Settings]  # the settings of each value, by the value's name


@dataclass(frozen=True)
class Need:
    """A stage whose matching run or file is passed on; on the axis `other` it is not the same."""

    stage: str
    other: str | None = None


@dataclass(frozen=True)
class Choice:
    """How a stage that tunes chooses: by `metric`, from a grid that may grow, or random trials."""

    metric: str
    grow: int
    trials: int | None
    measure: Settings | None  # those by which `evaluate` measures each run
    num_samples: int


@dataclass(frozen=True)
class StudyStage:
    """A command over the values of some axes; `settings` may hold lists of values."""

    name: str
    command: str
    settings: Settings
    axes: dict[str, Axis]
    needs: dict[str, Need]  # by the key that is given what the needed stage made
    after: tuple[str, ...]  # more stages that are needed
    length: Settings  # its own unit and amount of training
    share: float  # a factor on the length of each arm
    of: dict[str, list[str]]  # the values on axes of the runs that are compared or published
    choice: Choice | None
    protocol: Settings | None  # of its runs


@dataclass(frozen=True)
class Study:
    """A study as its file says it, after overrides of the command line."""

    name: str
    file: Path
    question: str
    common: Settings
    arms: Axis
    budget: Settings
    stages: dict[str, StudyStage]  # each after the stages that it needs


def find(config_dir: str | None) -> dict[str, Path]:
    """The files of all studies by name; a person's own hides one of the same name."""
    if config_dir and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir={config_dir} is no folder")
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    found = [path for folder in folders for path in (folder / "study").glob("*.yaml")]
    return dict(sorted({path.stem: path for path in found}.items()))


def load(name: str, overrides: Mapping[str, Any], config_dir: str | None) -> Study:
    """Reads and checks a study, with overrides of its own keys; a UserError names file and key."""
    files = find(config_dir)
    require("study", name, files)
    return _Reader(files[name], _plain(files[name], files, overrides)).study()


def _plain(path: Path, files: Mapping[str, Path], overrides: Mapping[str, Any]) -> Settings:
    """The content of a file, with that of its base and overrides."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except MarkedYAMLError as error:
        raise UserError(sentence(error)) from error
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold keys such as question, arms and stages")
    plain: Settings = {str(key): value for key, value in found.items()}
    if base := plain.get("base"):
        others = {name: file for name, file in files.items() if file != path}
        if str(base) not in others:
            raise UserError(f"{path}: base={base} is no other study{instead(str(base), others)}")
        plain = _merged(_plain(others[str(base)], others, {}), plain)
    plain = {"name": path.stem} | plain
    for key, value in overrides.items():
        _set(plain, key, value)
    return plain


def _merged(base: Settings, own: Settings) -> Settings:
    """A study on top of its base, whose common, budget and protocol it changes key by key."""
    merged = {key: value for key, value in base.items() if key not in ("base", "name")} | own
    for key in ("common", "budget", "protocol"):
        if isinstance(base.get(key), dict) and isinstance(own.get(key), dict):
            merged[key] = base[key] | own[key]
    if isinstance(own.get("budget"), dict) and set(own["budget"]) & set(LENGTHS):
        kept = set(own["budget"]) | set(BUDGET) - set(LENGTHS)
        merged["budget"] = {k: v for k, v in merged["budget"].items() if k in kept}
    return merged


def _set(plain: Settings, key: str, value: object) -> None:
    """Sets a key such as stages.tune.images, or axes.data.0.1 %.data.fraction: names have dots."""
    first, _, last = key.partition(".")
    where, last = (plain.setdefault(first, {}), last) if last else (plain, first)
    depth = 1
    while isinstance(where, dict) and (
        below := [n for n in where if last.startswith(f"{n}.") and isinstance(where[n], dict)]
    ):
        name = max(below, key=len)
        where, last, depth = where[name], last.removeprefix(f"{name}."), depth + 1
    if not isinstance(where, dict) or depth < DEPTHS.get(first, 0):
        raise UserError(f"{key} is no key of this study")
    if first == "budget" and last in LENGTHS:
        for each in LENGTHS:
            where.pop(each, None)
    where[last] = value


class _Reader:
    """Turns plain values of a file into a study; each error names the file and the key."""

    def __init__(self, file: Path, plain: Settings):
        self.file, self.plain = file, plain
        self.stages: dict[str, StudyStage] = {}

    def refuse(self, key: str, why: str) -> UserError:
        return UserError(f"{self.file}: {key}: {why}")

    def require(self, key: str, what: str, name: object, known: Iterable[str]) -> None:
        """Refuses a name that is not known; `what` says what it should be one of."""
        if name not in (names := list(known)):
            raise self.refuse(key, f"{name!r} is no {what}{instead(str(name), names)}")

    def mapping(self, key: str, value: object, known: Sequence[str] | None = None) -> Settings:
        """A mapping, with the known keys alone; null is an empty one."""
        if not isinstance(value or {}, dict):
            raise self.refuse(key, f"must hold keys with values, got {value!r}")
        found = {str(name): each for name, each in (value or {}).items()}  # type: ignore[attr-defined]
        for name in found if known is not None else ():
            self.require(f"{key}.{name}".strip("."), "key of a study", name, known or ())
        return found

    def study(self) -> Study:
        plain = self.mapping("", self.plain, KEYS)
        for key in ("question", ARMS, "stages"):
            if not plain.get(key):
                raise self.refuse(key, "is missing")
        self.protocol = self.mapping("protocol", plain.get("protocol"), PROTOCOL)
        axes = self.mapping("axes", plain.get("axes"))
        self.axes = {name: self.axis(f"axes.{name}", each) for name, each in axes.items()}
        self.axes[ARMS] = arms = self.axis(ARMS, plain[ARMS])
        contrasts = self.protocol.get("contrasts", "all")
        listed = contrasts if isinstance(contrasts, list) else [contrasts] * (contrasts != "all")
        if any(not isinstance(pair, list) or len(pair) != 2 for pair in listed):
            why = "must be all, or pairs of arms such as [[DiT, U-Net]]"
            raise self.refuse("protocol.contrasts", why)
        for arm in (arm for pair in listed for arm in pair):
            self.require("protocol.contrasts", "arm", arm, arms)
        budget = self.mapping("budget", plain.get("budget"), BUDGET)
        self.length("budget", budget)
        if ("match" in budget) != ("reference" in budget):
            raise self.refuse("budget", "match and reference belong together; write both")
        stages = {
            name: self.mapping(f"stages.{name}", each, (*STAGE_COMMANDS, *STAGE))
            for name, each in self.mapping("stages", plain["stages"]).items()
        }
        self.apart("stages", stages, OWN_FOLDERS)
        for name in self.in_order(stages):
            self.stages[name] = self.stage(name, stages[name])
        if not FOLDER.allows(name := str(plain["name"])):
            raise self.refuse("name", f"must be {FOLDER.wanted}, got {name!r}")
        facts = (name, self.file, str(plain["question"]))
        return Study(*facts, self.mapping("common", plain.get("common")), arms, budget, self.stages)

    def axis(self, key: str, values: object) -> Axis:
        """Values by name, each with settings; no two may have one folder."""
        self.apart(key, named := self.mapping(key, values))
        return {name: self.mapping(f"{key}.{name}", each) for name, each in named.items()}

    def apart(self, key: str, names: Iterable[str], taken: Sequence[str] = ()) -> None:
        """Refuses names with a comma, two names of one folder, and one whose folder is taken."""
        folders = dict.fromkeys(taken, "the study itself")
        for name in names:
            if "," in name:
                raise self.refuse(f"{key}.{name}", "a comma separates names; leave it out")
            if (other := folders.setdefault(slug(name).lower(), name)) != name:
                raise self.refuse(f"{key}.{name}", f"has the folder of {other!r}; rename one")

    def length(self, key: str, values: Settings) -> Settings:
        """The unit and amount of training that are given, if any."""
        given = {unit: values[unit] for unit in LENGTHS if values.get(unit) is not None}
        if len(given) > 1:
            raise self.refuse(key, f"{' and '.join(given)} cannot both be given; choose one")
        return {unit: self.within(f"{key}.{unit}", each, above(0)) for unit, each in given.items()}

    def within(self, key: str, value: Any, allowed: Range) -> Any:
        """The value; refuses one that is not in a range."""
        if not allowed.allows(value):
            raise self.refuse(key, f"must be {allowed.wanted}, got {value!r}")
        return value

    def in_order(self, stages: Mapping[str, Settings]) -> list[str]:
        """The names of the stages, each after those that it needs, else as they are written."""
        graph, ordered = {}, dict[str, None]()
        for name, plain in stages.items():
            needs, after = self.needs(name, plain)
            graph[name] = [*(need.stage for need in needs.values()), *after]
            for other in graph[name]:
                self.require(f"stages.{name}.needs", "stage", other, stages)
        while len(ordered) < len(graph):
            left = [name for name in graph if name not in ordered]
            ready = [name for name in left if set(graph[name]) <= ordered.keys()]
            if not ready:
                why = f"there is a circle in the needs of {' and '.join(left)}; remove a need"
                raise self.refuse("stages", why)
            ordered[ready[0]] = None
        return list(ordered)

    def needs(self, name: str, plain: Settings) -> tuple[dict[str, Need], tuple[str, ...]]:
        """The needs of a stage: by key, or as names of stages."""
        given, where = plain.get("needs") or [], f"stages.{name}.needs"
        if isinstance(given, str | list):
            return {}, tuple([given] if isinstance(given, str) else map(str, given))
        found = {}
        for key, each in self.mapping(where, given).items():
            own = each if isinstance(each, dict) else {"stage": each}
            parts = self.mapping(f"{where}.{key}", own, NEED)
            found[key] = Need(str(parts.get("stage")), parts.get("other"))
        return found, ()

    def stage(self, name: str, plain: Settings) -> StudyStage:
        key, commands = f"stages.{name}", [each for each in STAGE_COMMANDS if each in plain]
        if len(commands) != 1:
            found = " and ".join(commands) or "none"
            why = f"must have one command of {', '.join(STAGE_COMMANDS)}, found {found}"
            raise self.refuse(key, why)
        (command,) = commands
        needs, after = self.needs(name, plain)
        if command in ON_RUNS and "run" not in needs:
            raise self.refuse(f"{key}.needs", "must say which runs, as in {run: train}")
        if command in ON_FOLDERS and not after:
            raise self.refuse(f"{key}.needs", "must name the stages of the runs, as in [train]")
        settings = self.mapping(f"{key}.{command}", plain[command])
        if command == "sample-sweep" and (drawn := self.protocol.get(SAMPLING_SEEDS)):
            settings = {"seed": drawn} | settings  # each run is measured with all of them
        choice = self.choice(key, plain, command, settings)
        given = self.mapping(f"{key}.of", plain.get("of"), [*self.axes])
        of = {a: [*self.values(f"{key}.of.{a}", a, v, self.axes[a])] for a, v in given.items()}
        for name_of_need, need in needs.items():
            if need.other is not None:
                where, known = f"{key}.needs.{name_of_need}.other", self.stages[need.stage].axes
                self.require(where, "axis of that stage", need.other, known)
        axes = self.axes_of(key, plain, command, needs, choice)
        length = self.length(key, plain)
        share = self.within(f"{key}.share", plain.get("share", 1), above(0))
        protocol = None if choice else self.protocol_of(key, plain)
        return StudyStage(
            name, command, settings, axes, needs, after, length, share, of, choice, protocol
        )

    def protocol_of(self, key: str, plain: Settings) -> Settings | None:
        """The protocol of a stage's runs: the study's with its own changes; None if it is null."""
        if not self.protocol or ("protocol" in plain and plain["protocol"] is None):
            return None
        own = self.mapping(f"{key}.protocol", plain.get("protocol"), PROTOCOL)
        question = plain.get("question", self.plain["question"])
        seeds = {SEEDS: plain[SEEDS]} if SEEDS in plain else {}
        return {"question": question} | self.protocol | seeds | own

    def choice(self, key: str, plain: Settings, command: str, settings: Settings) -> Choice | None:
        if "choose" not in plain:
            for extra in (each for each in CHOOSING if each in plain):
                raise self.refuse(f"{key}.{extra}", "belongs to a stage with choose: METRIC")
            return None
        if command not in TRAINS:
            raise self.refuse(f"{key}.choose", f"only a stage of {' or '.join(TRAINS)} can tune")
        metric, known = str(plain["choose"]), [*VALIDATION, *(each.name for each in OF_SAMPLES)]
        unknown = higher_is_better(metric) is None and get_close_matches(metric.lower(), known)
        if unknown or quantity_of(metric) not in (None, *OF_SAMPLES):  # another may be one's own
            self.require(f"{key}.choose", "metric of a trial", metric, known)
        trials, measure = plain.get("trials"), plain.get("measure")
        for name, each in settings.items():
            if isinstance(each, list | dict) and not _varies(each, drawn=bool(trials)):
                why = "must be two or more numbers in rising order, or, with trials: N, numbers or "
                why += "a range: {log: [1e-3, 1e-1]} or {uniform: [0, 1]}"
                raise self.refuse(f"{key}.{command}.{name}", why)
        if not any(isinstance(each, list | dict) for each in settings.values()):
            raise self.refuse(f"{key}.{command}", "has no key with several values to choose from")
        if command == "train-autoencoder" and measure is None:
            raise self.refuse(f"{key}.measure", "is missing: the settings of evaluate")
        self.within(f"{key}.trials", trials, optional(whole(1)))
        grow = self.within(f"{key}.grow", plain.get("grow", 0 if trials else 4), whole(0))
        samples = self.within(f"{key}.num_samples", plain.get("num_samples", 1000), whole(1))
        by = None if measure is None else self.mapping(f"{key}.measure", measure)
        return Choice(metric, grow, trials, by, samples)

    def axes_of(
        self, key: str, plain: Settings, command: str, needs: dict[str, Need], choice: Choice | None
    ) -> dict[str, Axis]:
        """The axes of a stage with their values: those it goes over, or those of its command."""
        seeds = plain.get(SEEDS, TUNING_SEEDS if choice else self.protocol.get(SEEDS))
        axes: dict[str, Axis] = {ARMS: self.axes[ARMS]} if command == "train" else {}
        known = dict(self.axes)
        if command in ON_RUNS:
            axes = self.stages[needs["run"].stage].axes
            known |= axes
            if command == "evaluate" and (drawn := self.protocol.get(SAMPLING_SEEDS)):
                axes = axes | {SAMPLING_SEEDS: self.seeds("protocol", drawn)}
        over = plain.get("over")
        if over is None and command == "train":
            axes[SEEDS] = self.seeds(key, seeds)
        elif over is not None:
            given = dict.fromkeys(over, "all") if isinstance(over, list) else over
            axes = {}
            for name, values in self.mapping(f"{key}.over", given).items():
                if name == SEEDS and SEEDS not in known:
                    known[SEEDS] = self.seeds(key, seeds if values == "all" else values)
                axes[name] = self.values(f"{key}.over.{name}", name, values, known.get(name))
        return axes | ({SEEDS: self.seeds(key, seeds)} if choice else {})

    def values(self, where: str, name: str, values: object, known: Axis | None) -> Axis:
        """The values of an axis: all, a list of some, or some with more settings each."""
        if values == "all":
            if known is None:
                raise self.refuse(where, "is no axis of the study; give its values as a list")
            return known
        if not isinstance(values, list | dict):
            raise self.refuse(where, f"must be all or a list of values, got {values!r}")
        if known is None:  # of a key
            known = {str(value): {name: value} for value in values}
        for value in values:
            self.require(where, "value of this axis", str(value), known)
        extra = self.mapping(where, values) if isinstance(values, dict) else {}
        return {str(v): known[str(v)] | self.mapping(where, extra.get(str(v))) for v in values}

    def seeds(self, key: str, seeds: object) -> Axis:
        if not isinstance(seeds, list) or not seeds or any(type(s) is not int for s in seeds):
            key = "protocol" if seeds is self.protocol.get(SEEDS) else key
            raise self.refuse(f"{key}.{SEEDS}", f"must be whole numbers: [0, 1], got {seeds!r}")
        return {str(seed): {"seed": seed} for seed in seeds}


def _varies(values: Any, drawn: bool) -> bool:
    """Whether a key's values are numbers in rising order, or what numbers can be `drawn` from."""
    if not isinstance(values, dict):
        return SEVERAL.allows(values) and (
            drawn or all(low < high for low, high in pairwise(values))
        )
    ((kind, ends),) = values.items() if len(values) == 1 else [("", [])]
    least = {"uniform": -math.inf, "log": 0.0}.get(kind, math.inf)
    return drawn and SEVERAL.allows(ends) and len(ends) == 2 and least < ends[0] < ends[1]


def slug(name: str) -> str:
    """A name as a part of a path: U-Net at half its rate becomes U-Net-at-half-its-rate."""
    return re.sub(r"[^\w.+]+", "-", name).strip("-")
