"""The command `study`: lists studies, or runs one from what is done already."""

import re
import shlex
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from diffusion_lab.assembly.sentences import (
    HYDRA_VERSION,
    MISTAKES,
    conf_dir,
    parse,
    sentence,
    text_of,
)
from diffusion_lab.cli.commands import COMMANDS, admit, check_options
from diffusion_lab.cli.job import STOPPED
from diffusion_lab.cli.study import document
from diffusion_lab.cli.study.document import ARMS, SEEDS, TRAINS, Settings, Study, StudyStage
from diffusion_lab.cli.study.jobs import Jobs, StudyJob, several
from diffusion_lab.cli.study.processes import Processes
from diffusion_lab.cli.study.running import Records, Runner
from diffusion_lab.common.formats import duration, some
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import flag, whole

HELP = """Usage: diffusion-lab study [NAME] [override ...]

Runs a study from its question to its page: conf/study/NAME.yaml. Without a name it lists the
studies. Repeat the command to resume: what is done is not repeated, and an unfinished run goes on.

  diffusion-lab study unet_vs_dit jobs=2
  diffusion-lab study unet_vs_dit dry=true           print the plan and each command
  diffusion-lab study unet_vs_dit stages=tune,train arms="U-Net,DiT" seeds=0,1
  diffusion-lab study unet_vs_dit name=tryout budget.images=6_400 metrics.num_samples=100
  diffusion-lab study mine --config-dir my_conf      a file my_conf/study/mine.yaml

Keys: stages, arms and seeds narrow the study; jobs (1) are runs at once on this machine; dry=true
runs nothing; hydra/launcher=slurm submits all stages, and hydra.launcher.KEY=... says how. A key of
the study changes it: budget.images, protocol.seeds=[0,1], arms.ARM.KEY or stages.STAGE.seconds. Any
other is given to its trainings; of these, first stages take data, trainer and logger, classifiers
take data, and measurements metrics."""
OWN = re.compile(r"(name|question|(budget|protocol|common|axes|arms|stages)\.).*")
OPTIONS = {"dry": flag(), "jobs": whole(1)}
NARROWING = ("stages", ARMS, SEEDS)
LATE = {"tuning", "metrics.classifier"}  # needs that change no network


@dataclass
class Request:
    """A request: the values of a command line."""

    name: str | None = None
    config_dir: str | None = None
    dry: bool = False
    jobs: int = 1
    only: dict[str, list[str]] = field(default_factory=dict)
    launcher: list[str] = field(default_factory=list)
    own: Settings = field(default_factory=dict)
    given: Settings = field(default_factory=dict)


def study(arguments: list[str]) -> None:
    """Runs the command; exits with code 1 if a job failed, and 130 if Ctrl-C ended it."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    request = read(arguments)
    if request.name is None:
        show_studies(request.config_dir)
        return
    found = document.load(request.name, request.own, request.config_dir)
    jobs = Jobs(found, request.given)
    records, wanted = Records(jobs), narrowed(jobs, request.only)
    show_plan(found, records, wanted)
    flags = [f"--config-dir={request.config_dir}"] if request.config_dir else []
    if request.dry:
        print_commands(jobs, wanted, flags)
        return
    again = shlex.join(["diffusion-lab", "study", *arguments])
    processes = Processes(request.jobs, jobs.root / "logs", flags)
    left = [job for job in wanted if not records.done(job)]
    trainings = [first for job in wanted for first in jobs.first_of(job)]
    edited = [job for job in trainings if records.is_edited(job)]
    if left or edited:
        processes.call(check, jobs, left, edited, request.config_dir)
    records.write_plan()
    if not request.launcher:
        run(records, wanted, processes, again)
        return
    from diffusion_lab.cli.study.cluster import Submission  # late: it waits for torch

    here = [word for word in arguments if word not in request.launcher]
    submission = Submission(records, request.launcher, flags, here)
    for stage in found.stages:
        submission.submit([job for job in wanted if job.stage == stage])
    say("To see how they are:")
    say(f"  diffusion-lab status {jobs.root}")


def read(arguments: Sequence[str]) -> Request:
    """Reads the command line; raises UserError for what it does not know."""
    parser = ArgumentParser("diffusion-lab study", add_help=False, allow_abbrev=False)
    parser.add_argument("-cd", "--config-dir")
    known, rest = parser.parse_known_args(arguments)
    request = Request(config_dir=known.config_dir)
    for word in rest:
        if word.startswith("-"):
            raise UserError(f"study has no {word}; see diffusion-lab study --help")
        if "=" not in word:
            if request.name is not None:
                raise UserError(f"write one study at a time, not {request.name} and {word}")
            request.name = word
            continue
        key, _, text = word.lstrip("+").partition("=")
        if key in NARROWING:
            request.only[key] = [each.strip() for each in text.split(",") if each.strip()]
            if not request.only[key]:
                raise UserError(f"{word} names none of the {key}; write some, or leave it out")
        elif key in OPTIONS:
            if not OPTIONS[key].allows(value := value_of(word)):
                raise UserError(f"{word} must be {OPTIONS[key].wanted}")
            setattr(request, key, value)
        elif key.startswith("hydra"):
            if key == "hydra/launcher" and (text != "slurm" or shutil.which("sbatch") is None):
                raise UserError(
                    f"{word}: a study runs on this machine, several runs at once by jobs=2, or by "
                    "hydra/launcher=slurm where SLURM's sbatch is on the PATH"
                )
            request.launcher.append(word)
        elif OWN.fullmatch(key):
            request.own[key] = value_of(word)
        else:
            request.given[key] = value_of(word)
    if request.launcher and "hydra/launcher=slurm" not in request.launcher:
        raise UserError(f"{request.launcher[0]} needs hydra/launcher=slurm; write that, too")
    return request


def value_of(word: str) -> Any:
    """The value of an override as plain values; its key may have names with blanks."""
    override = parse([f"key={word.partition('=')[2]}"])[0]
    if override.is_sweep_override():
        raise UserError(f"{word} has several values; write a list, as in protocol.seeds=[0,1]")
    return override.value()


def narrowed(jobs: Jobs, only: Mapping[str, list[str]]) -> list[StudyJob]:
    """The jobs of the wanted stages, arms and seeds, and those of these stages that they need."""
    known = {
        "stages": list(jobs.study.stages),
        ARMS: list(jobs.study.arms),
        SEEDS: list({job.point[SEEDS]: 0 for job in jobs.all if SEEDS in job.point}),
    }
    for key, names in only.items():
        for name in names:
            if name not in known[key]:
                raise UserError(
                    f"{key}={name}: the study {jobs.study.name} has {', '.join(known[key])}"
                )
    stages = only.get("stages", known["stages"])
    axes = {axis: each for axis, each in only.items() if axis != "stages"}
    there = [job for job in jobs.all if job.stage in stages]
    chosen = [
        job
        for job in there
        if all(job.point.get(axis, each[0]) in each for axis, each in axes.items())
    ]
    keep = {id(job) for job in chosen}
    stack = [need for job in chosen if not job.paths for need in job.needs]
    while stack:
        job = stack.pop()
        if id(job) not in keep and job.stage in stages:
            keep.add(id(job))
            stack += job.needs
    return [job for job in there if id(job) in keep]


def show_studies(config_dir: str | None) -> None:
    """Prints all studies with their questions, and how much is done of each."""
    table = Table("study", "question", "done")
    for name in document.find(config_dir):
        found = document.load(name, {}, config_dir)
        jobs = Jobs(found, {})
        done = sum(map(Records(jobs).done, jobs.all)) if jobs.root.is_dir() else 0
        table.add_row(name, escape(found.question), f"{done} of {len(jobs.all)}")
    console.print(table)
    say("`diffusion-lab study NAME dry=true` shows what a study does; without dry=true it runs")


def show_plan(study: Study, records: Records, wanted: Sequence[StudyJob]) -> None:
    """Prints the question, and for each stage its jobs, how many are done, and the time to go."""
    say(study.question)
    table = Table("stage", "command", "jobs", "done", "to go")
    for name, stage in study.stages.items():
        jobs = [job for job in wanted if job.stage == name]
        if not jobs:
            continue
        left = [job for job in jobs if not records.done(job)]
        seconds = records.time_left(records.left(jobs))
        command = f"tune by {stage.choice.metric}" if stage.choice else stage.command
        time = "" if not left else duration(seconds) if seconds else "not known"
        table.add_row(name, command, str(len(jobs)), str(len(jobs) - len(left)), time)
    console.print(table)


def print_commands(jobs: Jobs, wanted: Sequence[StudyJob], flags: Sequence[str]) -> None:
    """Prints the commands of jobs, with the first trials in place of those that tune."""
    for each in (first for job in wanted for first in jobs.first_of(job)):
        print(shlex.join(["diffusion-lab", each.command, *flags, *each.arguments]))
        if measurement := jobs.measurement(each):
            print(shlex.join(["diffusion-lab", "evaluate", *flags, *measurement.arguments]))


def check(
    jobs: Jobs, left: Sequence[StudyJob], edited: Sequence[StudyJob], config_dir: str | None
) -> None:
    """Composes a training of each arm, or what else a stage runs; raises UserError if that fails.

    The first of each arm that has not begun and needs no run is built, too, so that a network that
    does not fit the images or a size that cannot be matched is refused now. It raises it for a
    training of `edited`, too, if it is done and is now another one.
    """
    # late: they wait for torch, which the process that calls this has
    from diffusion_lab.cli.sweeps import first_job
    from diffusion_lab.training.study import check_protocol, require_same
    from diffusion_lab.training.tuned import with_tuned

    firsts = [jobs.first_of(job)[0] for job in left]
    trainings = {(job.stage, job.label): job for job in firsts if job.command in TRAINS}
    flags = [] if config_dir is None else ["--config-dir", config_dir]
    check_others(jobs, firsts, flags)
    changed = {job.title: job for job in edited}
    built = not_begun(jobs, [*trainings.values()])
    for job in ({job.title: job for job in trainings.values()} | changed).values():
        try:
            check_options(job.arguments)
            cfg = first_job(job.command, flags, job.arguments)
            check_protocol(cfg)
            require_chosen_by(cfg, job, jobs.study.stages[job.stage], flags)
            if job.title in built:
                build(cfg, job, flags)
            if job.title in changed:
                HydraConfig.instance().set_config(cfg)  # names are made of its choices
                del cfg.hydra
                require_same(job.made, with_tuned(cfg), "name")
        except MISTAKES as error:
            raise UserError(f"{jobs.study.file}: {job.title}: {sentence(error)}") from error


def require_chosen_by(cfg: DictConfig, job: StudyJob, stage: StudyStage, flags: list[str]) -> None:
    """Raises UserError if a stage that tunes cannot choose by what its trials measure."""
    from diffusion_lab.cli.sweeps import first_job  # late, as above
    from diffusion_lab.training.study import check_choice, require_evaluation

    if not stage.choice:
        return
    if stage.choice.measure is None:
        require_evaluation(cfg, f"choose: {stage.choice.metric}", stage.choice.metric)
    later = {k: v for k, v in (stage.choice.measure or {}).items() if k.startswith("metrics")}
    own = [f"{key}={text_of(value)}" for key, value in later.items()]
    measured = first_job(job.command, flags, [*job.arguments, *own]) if own else cfg
    check_choice(measured, stage.choice.metric, several(stage))


def not_begun(jobs: Jobs, trainings: Sequence[StudyJob]) -> set[str]:
    """Titles of the first training of each arm of which none has begun, of those without a run."""
    firsts = [jobs.first_of(job)[0] for job in jobs.all]
    begun = {job.point.get(ARMS) for job in firsts if job.command in TRAINS and job.made.exists()}
    titles: dict[str | None, str] = {}
    for job in trainings:
        if jobs.study.stages[job.stage].needs.keys() <= LATE:
            titles.setdefault(job.point.get(ARMS), job.title)
    return {title for arm, title in titles.items() if arm not in begun}


def build(cfg: DictConfig, job: StudyJob, flags: list[str]) -> None:
    """Builds what a training would train, without memory for it; raises UserError as it would."""
    from diffusion_lab.assembly.config_keys import updated  # late, as above
    from diffusion_lab.cli.sweeps import searched
    from diffusion_lab.estimate.budget import with_budget
    from diffusion_lab.training.task import build_task

    place = initialize_config_dir(str(conf_dir()), **HYDRA_VERSION)
    with place, console.capture():  # which would hold a table for each arm
        alone = updated(cfg, dict.fromkeys(LATE))
        build_task(with_budget(alone, [*job.arguments, *searched(flags)]), "meta")


def check_others(jobs: Jobs, firsts: Sequence[StudyJob], flags: list[str]) -> None:
    """Composes what does not train, and a measurement of each arm of a stage that tunes.

    Keys of a run's sampler, guidance and metrics are not among them: only the run knows these.
    """
    from diffusion_lab.cli.sweeps import first_job  # late, as in `check`

    others = [each for job in firsts if (each := jobs.measurement(job))]
    others += [job for job in firsts if job.command not in TRAINS]
    for job in {(job.stage, job.label): job for job in others}.values():
        overrides, groups = job.arguments[len(job.paths) :], COMMANDS[job.command].run_groups
        try:
            check_options(overrides)
            first_job(job.command, flags, [admit(each, groups) for each in overrides])
        except MISTAKES as error:
            raise UserError(f"{jobs.study.file}: {job.title}: {sentence(error)}") from error


def run(records: Records, wanted: Sequence[StudyJob], processes: Processes, again: str) -> None:
    """Runs the jobs that are not done, and says what came of them."""
    runner = Runner(records, processes, wanted)
    try:
        runner.run()
    except KeyboardInterrupt:
        processes.stop()
        say("Stopped. To go on, repeat:")
        say(f"  {again}")
        sys.exit(STOPPED)
    for name, why in runner.failed.items():
        say(f"Failed: {name}: {why}")
    if runner.blocked:
        name, why = next(iter(runner.blocked.items()))
        say(f"Not begun: {len(runner.blocked)} jobs, the first of them {name}: {why}")
    if runner.elsewhere:
        say(f"Trained by other processes: {some(runner.elsewhere)}; repeat the command later")
    pages = [job for job in wanted if job.command == "compare" and records.done(job)]
    for job in pages:
        if answer := records.answer(job):
            say(f"{answer}.")
        say(f"Page: {job.made / 'index.html'}")
    if runner.failed or runner.blocked:
        say("To try again what is not done, repeat:")
        say(f"  {again}")
        sys.exit(1)
