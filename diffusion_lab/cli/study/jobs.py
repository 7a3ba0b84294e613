"""The jobs of a study: for each stage one command for each combination of its axes' values."""

import hashlib
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from diffusion_lab.assembly.sentences import text_of
from diffusion_lab.cli.study.document import (
    ARMS,
    LENGTHS,
    ON_FOLDERS,
    ON_RUNS,
    SEEDS,
    TRAINS,
    Axis,
    Choice,
    Need,
    Settings,
    Study,
    StudyStage,
    slug,
)
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import above
from diffusion_lab.training.tuned import FOUND

IN_PLACES = ("arm", "run_dir", "output")  # keys of a job that have its name or place
# where a command on a run writes in its folder, as `compare` and `publish` read it
MADE = {"sample-sweep": "sweeps", "memorization": "memorization", "evaluate": "evaluations"}
TAKES = {  # the parts of given settings for commands other than train, which takes all
    "train-autoencoder": ("data", "trainer", "logger"),
    "train-extractor": ("data",),
    **dict.fromkeys(ON_RUNS, ("metrics",)),
}
CHOOSE = "choose"  # the command of a job that tunes: it runs trials, and writes what is best
BETWEEN = " \N{MIDDLE DOT} "  # separates the values of axes in a label
Point = dict[str, str]  # the name of a value on each axis


@dataclass(frozen=True)
class StudyJob:
    """A command of a study, what it makes, and the jobs that it needs."""

    stage: str
    command: str
    point: Point
    label: str  # what people call the runs that differ in nothing but their seed
    settings: Settings = field(repr=False)
    made: Path  # the run's folder, or what else the command writes
    needs: tuple["StudyJob", ...] = field(default=(), repr=False)
    paths: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The name of the job in its stage, as a part of a path."""
        return name_of(self.point)

    @property
    def title(self) -> str:
        """The name of the job for people: its stage, and its values."""
        seed = f", seed {self.point[SEEDS]}" if SEEDS in self.point else ""
        tried = self.made.name.partition(f"{self.name}_")[2] if self.point else ""
        return f"{self.stage}: {self.label}{seed}{f' ({tried})' if tried else ''}".rstrip(": ")

    @property
    def arguments(self) -> list[str]:
        """The arguments of the command."""
        several = self.command == "sample-sweep"
        keys = [f"{key}={text_of(value, several)}" for key, value in self.settings.items()]
        return [*map(str, self.paths), *keys]


def name_of(point: Mapping[str, str]) -> str:
    """The values of a point as a part of a path."""
    heads = {ARMS: "", SEEDS: "seed-"}
    return "_".join(slug(heads.get(axis, f"{axis}-") + value) for axis, value in point.items())


def label_of(point: Mapping[str, str]) -> str:
    """The values of a point but for its seed; those of a key are named by it."""
    words = [
        value if axis == ARMS or not re.search("[./]", axis) else f"{axis}={value}"
        for axis, value in point.items()
        if axis != SEEDS
    ]
    return BETWEEN.join(words)


def present(command: str, arguments: Sequence[str]) -> list[str]:
    """A command without folders of runs to compare or publish in which no run has begun."""
    folders = command in ON_FOLDERS
    there = [each for each in arguments if not folders or "=" in each or Path(each).exists()]
    return [command, *there]


def points(axes: Mapping[str, Axis]) -> Iterator[Point]:
    """Every combination of the values, the last axis changing fastest."""
    for names in product(*axes.values()):
        yield dict(zip(axes, names, strict=True))


def merged(settings: Settings, more: Settings) -> Settings:
    """Settings on top of others: null replaces all keys below it, a length one in another unit."""
    units = [f"budget.{unit}" for unit in LENGTHS]
    replaced = tuple(f"{key}." for key, value in more.items() if value is None)
    if any(more.get(unit) is not None for unit in units):
        replaced += tuple(units)
    return {k: v for k, v in settings.items() if not k.startswith(replaced)} | more


def several(stage: StudyStage) -> dict[str, Any]:
    """The keys that a stage tunes, each with its grid or range."""
    return {key: each for key, each in stage.settings.items() if isinstance(each, list | dict)}


def first_values(stage: StudyStage, name: str) -> list[Settings]:
    """The values to begin with: a grid's, or random ones that the stage and `name` alone decide."""
    assert stage.choice is not None
    grids = several(stage)
    if stage.choice.trials is None:
        return [dict(zip(grids, each, strict=True)) for each in product(*grids.values())]
    drawn: list[Settings] = []
    for trial in range(stage.choice.trials):
        text = f"{stage.name} {name} {trial}"
        draw = random.Random(hashlib.sha256(text.encode()).digest())
        values = {key: _drawn(each, draw) for key, each in grids.items()}
        if values not in drawn:  # of a few in lists, some come again
            drawn.append(values)
    return drawn


def _drawn(values: Any, draw: random.Random) -> Any:
    if isinstance(values, list):
        return draw.choice(values)
    ((kind, (low, high)),) = values.items()
    if kind == "log":
        return short(math.exp(draw.uniform(math.log(low), math.log(high))))
    return short(draw.uniform(low, high))


def short(value: float) -> float:
    """A value in three digits, so that 0.001 * 2 * 2 is 0.004."""
    return float(f"{value:.3g}")


class Jobs:
    """The jobs of all stages of a study; `given` are settings for all commands that take them."""

    def __init__(self, study: Study, given: Settings):
        self.study, self.given, self.root = study, given, OUTPUTS / study.name
        self._made: dict[str, list[StudyJob]] = {}
        for name, stage in study.stages.items():  # each after those that it needs
            self._require_free(stage)
            units = {axis: each for axis, each in stage.axes.items() if axis != SEEDS}
            self._made[name] = (
                [self._chooser(stage, point) for point in points(units)]
                if stage.choice
                else [self.job(stage, point) for point in points(stage.axes)]
            )
        reports: dict[Path, StudyJob] = {}
        for job in self.all:
            if job.command == "memorization" and reports.setdefault(job.made, job) is not job:
                raise UserError(
                    f"{study.file}: stages.{job.stage}: {reports[job.made].title} already writes "
                    f"the report of this run, {job.made}; leave one of the two out"
                )
        self._require_apart()

    def _require_apart(self) -> None:
        """Raises UserError for two trainings in one folder, or two jobs with one record."""
        known: dict[object, StudyJob] = {}
        for job in (first for each in self.all for first in self.first_of(each)):
            place = job.made if job.command in (*TRAINS, "sample-sweep") else slug(job.title)
            if (other := known.setdefault(place, job)) is not job:
                mine, theirs = job.settings, other.settings
                keys = [k for k in mine if theirs.get(k) != mine[k] and k not in IN_PLACES]
                why = f"{job.title} and {other.title} would have one folder or record, {place}; "
                if job.stage == other.stage and keys:
                    values = f"{keys[0]}={theirs.get(keys[0])} and {keys[0]}={mine[keys[0]]}"
                    why += f"name {values} in arms, as minus and plus"
                else:
                    why += f"rename the stage {job.stage}"
                raise UserError(f"{self.study.file}: stages.{job.stage}: {why}")

    @property
    def all(self) -> list[StudyJob]:
        """All jobs, each after those that it needs."""
        return [job for jobs in self._made.values() for job in jobs]

    def of(self, stage: str) -> list[StudyJob]:
        """The jobs of a stage; of one that tunes, those that choose."""
        return self._made[stage]

    def _chooser(self, stage: StudyStage, point: Point) -> StudyJob:
        of_seeds = (self.job(stage, point | {SEEDS: seed}).needs for seed in stage.axes[SEEDS])
        needs = tuple({need.title: need for needs in of_seeds for need in needs}.values())
        made = self.root / slug(stage.name) / FOUND
        return StudyJob(stage.name, CHOOSE, point, label_of(point), {}, made, needs)

    def trials(self, chooser: StudyJob, values: Settings) -> list[StudyJob]:
        """The trainings of a stage that tunes, at one of its points, with values to try."""
        stage = self.study.stages[chooser.stage]
        return [
            self.job(stage, chooser.point | {SEEDS: seed}, values) for seed in stage.axes[SEEDS]
        ]

    def first_of(self, job: StudyJob) -> list[StudyJob]:
        """The commands with which a job begins: the trials of one that tunes, or itself."""
        if job.command != CHOOSE:
            return [job]
        values = first_values(self.study.stages[job.stage], job.name)
        return [trial for each in values for trial in self.trials(job, each)]

    def measurement(self, trial: StudyJob) -> StudyJob | None:
        """The evaluation of a trial, if the stage has one."""
        choice = self.study.stages[trial.stage].choice
        if not choice or choice.measure is None:
            return None
        own = {"run": str(trial.made), "seed": trial.settings["seed"]} | self._given("evaluate")
        settings = own | {"metrics.num_samples": choice.num_samples} | choice.measure
        return replace(trial, command="evaluate", settings=settings, needs=(trial,))

    def job(self, stage: StudyStage, point: Point, values: Settings | None = None) -> StudyJob:
        """The job of a stage at a point; `values` are those that a tuning tries."""
        where = f"{self.study.file}: stages.{stage.name}.needs"
        matched = {
            key: self._match(need, point, f"{where}.{key}") for key, need in stage.needs.items()
        }
        needed = {key: job for key, job in matched.items() if job}
        after = [each for name in stage.after for each in self.of(name)]
        tried = [slug(f"{key}-{value}") for key, value in (values or {}).items()]
        folder = self.root / slug(stage.name) / "_".join(filter(None, (name_of(point), *tried)))
        paths: tuple[Path, ...] = ()
        if stage.command in TRAINS:
            settings = self._training(stage, point, values or {}) | {"run_dir": str(folder)}
        elif stage.command == "train-extractor":
            settings = stage.settings | self._given(stage.command)
            if "data" not in settings:
                where = f"{self.study.file}: stages.{stage.name}.{stage.command}"
                raise UserError(f"{where}: data is missing; write {{data: fashion_mnist}}")
            root = Path(os.environ.get("DIFFUSION_LAB_DATA", "data"))
            usual = root / "extractors" / f"{settings['data']}.safetensors"
            folder = Path(settings.get("output") or usual)
            settings |= {"output": str(folder)}
        elif stage.command in ON_RUNS:
            if (run := needed.get("run")) is None or run.command not in TRAINS:
                why = "must be the runs of a stage that trains and does not tune"
                raise UserError(f"{where}.run: {why}; {label_of(point) or 'it'} has none")
            folder = run.made / MADE[stage.command]
            settings = _on_run(stage, point, run) | self._given(stage.command)
            own = {a: v for a, v in point.items() if a not in run.point}
            if stage.command == "sample-sweep":
                folder /= "_".join(filter(None, (slug(stage.name), name_of(own))))
            elif stage.command == "evaluate":
                folder /= slug(stage.name)
            elif isinstance(step := settings.get("step"), int):
                folder /= f"step_{step:07d}"  # where `memorization` writes by itself
            if folder.name == "memorization" or stage.command == "sample-sweep":
                settings |= {"output": str(folder)}
        else:
            after = [each for each in after if _agree(each.point, point, stage.of)]
            paths = self._paths(after)
            settings = {"output": str(folder)} | stage.settings
        for key, job in needed.items():  # a folder or file, or the place of a choice
            chosen = {"file": str(job.made), "of": job.label}
            settings[key] = chosen if job.command == CHOOSE else str(job.made)
        needs = (*needed.values(), *after)
        what = (stage.name, stage.command, point, label_of(point))
        return StudyJob(*what, settings, folder, needs, paths)

    def _given(self, command: str) -> Settings:
        """The given settings that a command takes."""
        takes = TAKES.get(command)
        return {k: v for k, v in self.given.items() if takes is None or k.split(".")[0] in takes}

    def _require_free(self, stage: StudyStage) -> None:
        """Raises UserError if a given setting would replace values in which trainings differ."""
        places = {ARMS: ARMS, SEEDS: "protocol.seeds"}
        for key, value in self._given(stage.command).items():
            tuned = stage.choice and key in several(stage)
            where = [f"stages.{stage.name}.{stage.command}"] if tuned else []
            for axis, each in stage.axes.items() if stage.command in TRAINS else ():
                if len({str(settings.get(key)) for settings in each.values()}) > 1:
                    where.append(places.get(axis, f"axes.{axis}"))
            if where:
                raise UserError(
                    f"{key}={text_of(value)}: runs of the study {self.study.name} differ in "
                    f"{key}; change the values in its {where[0]} instead"
                )

    def _match(self, need: Need, point: Point, where: str) -> StudyJob | None:
        """The needed job with this point's values; None if another is wanted and there is none."""
        axes = self.study.stages[need.stage].axes
        # an axis on which the needed stage has a single value need not agree
        same = {a: v for a, v in point.items() if a != need.other and len(axes.get(a, ())) > 1}
        apart = {need.other: point.get(need.other)} if need.other else {}
        found = [
            job
            for job in self.of(need.stage)
            if all(job.point.get(axis, value) == value for axis, value in same.items())
            and all(job.point.get(axis) != value for axis, value in apart.items())
        ]
        if apart:
            return next(iter(found), None)
        if len(found) != 1:
            at = ", ".join(f"{axis}={value}" for axis, value in point.items())
            count = "several jobs" if found else "no job"
            raise UserError(
                f"{where}: the stage {need.stage!r} has {count} for {at}; let both go over the "
                "same values"
            )
        return found[0]

    def _training(self, stage: StudyStage, point: Point, values: Settings) -> Settings:
        """The settings of a training but for its folder."""
        study = self.study
        own: Settings = {"study_name": study.name}
        if stage.command == "train":
            own["arm"] = label_of(point)
            if stage.protocol:
                own["protocol"] = stage.protocol
            match = {"budget": study.budget.get("match")}
            match |= {f"budget.{key}": study.budget.get(key) for key in ("reference", "tolerance")}
            own = merged(own, study.common) | {k: v for k, v in match.items() if v is not None}
            length = {f"budget.{u}": study.budget[u] for u in LENGTHS if u in study.budget}
            own = merged(own, length)
        for axis, value in point.items():
            own = merged(own, stage.axes[axis][value])
        fixed = {k: v for k, v in stage.settings.items() if not (stage.choice and k in values)}
        own = merged(merged(own, fixed), {f"budget.{u}": v for u, v in stage.length.items()})
        for unit in LENGTHS:
            amount: Any = own.get(f"budget.{unit}")
            if amount is not None:
                if not above(0).allows(amount) or not round(amount * stage.share):
                    where = f"{study.file}: stages.{stage.name}: {label_of(point)}"
                    share = f" times a share of {stage.share}" if stage.share != 1 else ""
                    why = f"must be a number that rounds to 1 or more, got {amount!r}{share}"
                    raise UserError(f"{where}: budget.{unit} {why}")
                own = {"budget": unit} | own | {f"budget.{unit}": round(amount * stage.share)}
        own = merged(own, self._given(stage.command))
        if stage.choice and stage.command == "train":
            own = measured_for(stage.choice, own)
        return own | values

    def _paths(self, needed: Sequence[StudyJob]) -> tuple[Path, ...]:
        """The runs of some jobs, or the folder of a stage if all of its runs are among them."""
        found: dict[Path, None] = {}
        # measurements count with their runs
        runs = [job.needs[0] if job.command in ON_RUNS else job for job in needed]
        trained = dict.fromkeys(job.stage for job in runs if job.command in TRAINS)
        whole = [stage for stage in trained if self._is_whole(stage, runs)]
        for job in runs:
            found |= dict.fromkeys(job.paths)  # of a comparison
            if job.command in TRAINS:
                found[self.root / slug(job.stage) if job.stage in whole else job.made] = None
        return tuple(found)

    def _is_whole(self, stage: str, runs: Sequence[StudyJob]) -> bool:
        """Whether a stage's folder has the runs of all its jobs, all among `runs`, and no other."""
        jobs = self.of(stage)
        # one of an arm that has left the study may still be there
        there = {run.parent for run in (self.root / slug(stage)).glob("*/config.yaml")}
        return all(job in runs for job in jobs) and there <= {job.made for job in jobs}


def measured_for(choice: Choice, settings: Settings) -> Settings:
    """The settings of a trial, which is measured on validation images alone."""
    if choice.metric.startswith("val/"):
        return merged(settings, {"callbacks.evaluation": None})
    return settings | {
        "metrics.reference": "validation",
        "metrics.num_samples": choice.num_samples,
        "callbacks.evaluation.every_n_steps": None,
        "callbacks.evaluation.also_steps": None,
    }


def _agree(own: Point, point: Point, of: Mapping[str, Sequence[str]]) -> bool:
    """Whether a run is at a point, as far as they share axes, and among the wanted values."""
    at = all(own.get(axis, value) == value for axis, value in point.items())
    return at and all(axis not in own or own[axis] in wanted for axis, wanted in of.items())


def _on_run(stage: StudyStage, point: Point, run: StudyJob) -> Settings:
    """The settings of a measurement, with the training seed unless it has one of its own."""
    own: Settings = {"run": str(run.made), "seed": run.settings.get("seed", 0)}
    for axis, value in point.items():
        if axis not in run.point:
            own |= stage.axes[axis][value]
    return own | stage.settings
