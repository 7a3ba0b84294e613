"""The table of commands, each with a line of USAGE and conf/<name>.yaml, and their arguments."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from diffusion_lab.assembly.sentences import conf_dir, instead, key_of, parse
from diffusion_lab.common.messages import UserError

USAGE = """Usage: diffusion-lab COMMAND [override=value ...]

Commands:
  study             run a study, from its question to its page
  train             train a diffusion model, or several in a sweep (-m)
  sample            generate images with a trained run
  demo              show one or two runs drawing, on a page on this machine
  evaluate          measure FID and other metrics of a trained run
  compare           compare runs in a table, plots, and a web page with a verdict
  publish           write a small folder with everything that checks a comparison of runs
  status            show which runs wait, train, have ended or failed
  memorization      check whether a trained run copies its training images
  train-autoencoder train an autoencoder, for diffusion in its latents
  train-extractor   train a classifier on the data, for use by metrics
  sample-sweep      compare samplers, steps and guidance scales for a trained run
  likelihood        measure bits per dimension of test images
  encode            turn images into noise and back
  inpaint           fill in the missing part of images
  average           averages of a run's weights of any length, after training
  import            open published weights of DiT, SiT, EDM, ADM or diffusers like a run
  export            save a trained model as a folder to share
  doctor            check a training run before it starts
  profile           measure parameters, MACs, memory and speed of a composition
  plan              compute memory, time and disk of a training run on GPUs that are not here
  match             find the size at which one backbone costs as much as another
  sync              upload offline W&B runs
  wandb-report      create a W&B workspace and a report that compare runs

`diffusion-lab COMMAND --help` explains a command and lists its keys and groups of options, and
`diffusion-lab options [GROUP[=OPTION]]` what can be chosen in them.
Quick start: diffusion-lab train experiment=quickstart"""
MULTIRUN = ("-m", "--multirun")
# Hydra's flags that only say where configurations are
PLACES = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")
# Hydra's flags whose value is the next argument
WITH_A_VALUE = (*PLACES, "--cfg", "-c", "--package", "-p", "--info", "-i")
# Hydra's flags for something to do, of which it takes one
DEEDS = (*MULTIRUN, "--run", "-r", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
FLAGS = (  # all of Hydra's flags
    *(*DEEDS, *WITH_A_VALUE, "--help", "-h", "--hydra-help", "--resolve", "--version"),
    "--experimental-rerun",
)


@dataclass(frozen=True)
class Command:
    """A command: `function` is the module:name of f(cfg, overrides) in this package, imported late.

    The function returns what `json=true` prints. If the command `trains`, the function returns the
    value that a search optimises instead, and a sweep ends with a report on all jobs.
    """

    function: str
    run_groups: tuple[str, ...] = ()  # groups whose default is the run's option
    takes_paths: bool = False  # arguments that are not overrides fill the key `paths`
    on_all_devices: bool = False  # in a process per device, by the keys device and devices
    combines: bool = False  # f has a third argument, all Combinations of comma-separated values
    trains: bool = False
    extra: str = ""  # the extra with the packages that its module needs
    fails: Callable[[Any], bool] = lambda result: False  # whether a result makes the exit code 1


def found_errors(result: dict[str, Any]) -> bool:
    """Whether `doctor` found an error."""
    return any(check["status"] == "error" for check in result["checks"])


def does_not_fit(result: dict[str, Any]) -> bool:
    """Whether a run that `plan` looked at does not fit into memory."""
    return any(each.get("fits") is False for each in result.get("plans", [result]))


SAMPLING = ("sampler", "guidance")
MEASURING = (*SAMPLING, "metrics")
# groups of which each kind of an import chooses the option
KINDS_CHOOSE = ("backbone", "first_stage", "schedule", "objective", "sampler")
COMMANDS = {
    "train": Command("cli.training_job:train_model", trains=True),
    "sample": Command("analysis.sample:sample", SAMPLING, on_all_devices=True),
    "demo": Command("analysis.demo:demo", takes_paths=True, extra="demo"),
    "evaluate": Command("analysis.evaluate:evaluate_run", MEASURING, on_all_devices=True),
    "compare": Command("report.page:compare_runs", takes_paths=True),
    "publish": Command("analysis.publishing:publish_runs", takes_paths=True),
    "status": Command("analysis.status:status", takes_paths=True),
    "memorization": Command("analysis.memorization:memorization", MEASURING, on_all_devices=True),
    "train-autoencoder": Command("cli.training_job:train_first_stage", trains=True),
    "train-extractor": Command("training.train_extractor:train_extractor"),
    "sample-sweep": Command(
        "analysis.evaluate:sweep", MEASURING, on_all_devices=True, combines=True
    ),
    "likelihood": Command("analysis.on_test_images:likelihood", on_all_devices=True),
    "encode": Command("analysis.on_test_images:encode_images", on_all_devices=True),
    "inpaint": Command("analysis.on_test_images:inpaint", SAMPLING, on_all_devices=True),
    "average": Command("analysis.average:average"),
    "import": Command("runs.importing.command:import_network", KINDS_CHOOSE, takes_paths=True),
    "export": Command("runs.export:export"),
    "doctor": Command("estimate.doctor:doctor", fails=found_errors),
    "profile": Command("estimate.profile:profile", combines=True),
    "plan": Command("estimate.plan:plan", combines=True, fails=does_not_fit),
    "match": Command("estimate.budget:match"),
    "sync": Command("analysis.wandb_sync:sync", takes_paths=True),
    "wandb-report": Command("analysis.wandb_pages:wandb_report", takes_paths=True, extra="report"),
}
OF_LINES = ("study", "options", "help")  # commands that are for the command line alone


def command_named(name: str) -> Command:
    """The command of this name; raises UserError if there is none."""
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}{instead(name, [*COMMANDS, *OF_LINES])}")
    return COMMANDS[name]


def prepare(command: Command, arguments: list[str]) -> list[str]:
    """Rewrites the arguments of a command for Hydra; raises UserError for wrong ones."""
    if "" in arguments:
        raise UserError("one of the arguments is empty; remove it, or write key=value")
    check_flags(arguments)
    for key, _, name in (argument.partition("=") for argument in arguments):
        if key in ("study", "+study"):
            raise UserError(f"{key}={name} is no option; write diffusion-lab study {name}")
    arguments = [with_pretrained(argument) for argument in arguments]
    if command.combines:
        flags, overrides = apart(arguments)
        arguments = [*(flag for flag in flags if flag not in MULTIRUN), *gather(overrides)]
    arguments = gather_paths(arguments) if command.takes_paths else with_run(arguments)
    check_options(apart(arguments)[1])
    resumes = any(argument.startswith("resume=") for argument in arguments)
    groups = (*command.run_groups, "data") if resumes else command.run_groups
    arguments = [admit(argument, groups) for argument in arguments]
    if launchers := [each for each in arguments if each.startswith("hydra/launcher=")]:
        if "slurm" in launchers[-1] and shutil.which("sbatch") is None:
            raise UserError(
                f"{launchers[-1]} needs SLURM's sbatch, which is not on the PATH; run this on a "
                "machine of the cluster, or leave hydra/launcher out"
            )
        if flags_in(arguments) <= set(PLACES):
            arguments = [*arguments, "-m"]  # else Hydra silently runs a single job here
    return in_a_row(arguments)


def flags_in(arguments: list[str]) -> set[str]:
    """The flags among the arguments, without the values that stand behind a =."""
    return {argument.split("=")[0] for argument in arguments if argument.startswith("-")}


def check_flags(arguments: list[str]) -> None:
    """Raises UserError for Hydra's flags that do not go together."""
    flags = flags_in(arguments)
    for flag in sorted(flags - {*FLAGS}):
        name = flag.lstrip("-").replace("-", "_")
        raise UserError(f"there is no flag {flag}; keys are written without dashes: {name}=...")
    if len(deeds := sorted(flags & set(DEEDS))) > 1:
        raise UserError(f"{' and '.join(deeds)} cannot be combined; leave all but one out")
    if "--resolve" in flags and not flags & {"--cfg", "-c", "--help", "-h"}:
        raise UserError("--resolve belongs to --cfg; write --cfg job --resolve")


def check_options(overrides: list[str]) -> None:
    """Raises UserError for a value that cannot be the name of an option, or of several."""
    for each in parse(overrides):
        group = each.key_or_group
        searched = each.is_sweep_override() and not each.is_discrete_sweep()
        if each.is_delete() or searched or not (conf_dir() / group).is_dir():
            continue
        values = each.sweep_iterator() if each.is_sweep_override() else [each.value()]
        names = [name for v in values for name in (v if isinstance(v, list) else [v])]
        if not all(isinstance(name, str | dict) for name in names):
            without = f"{group}=none, or " * (conf_dir() / group / "none.yaml").is_file()
            raise UserError(
                f"{each.input_line} names no option of the group {group}; write {without}"
                f"{group}= and one of the options that --help lists"
            )


def admit(override: str, groups: tuple[str, ...]) -> str:
    """Marks an override with ++ if it may name a key of a run's own option, unknown to Hydra."""
    return f"++{override}" if override.startswith(tuple(f"{g}." for g in groups)) else override


def gather(overrides: list[str]) -> list[str]:
    """Moves overrides with several values into combinations=[...]; of a key the last one counts."""
    parsed = parse(overrides)
    last = {key_of(each): each for each in parsed}
    single, several = [], []
    for text, each in zip(overrides, parsed, strict=True):
        if not each.is_sweep_override():
            single.append(text)
        elif last[key_of(each)] is each:
            several.append(text)
    return [*single, f"combinations={_quoted(several)}"] if several else single


def flagged(arguments: list[str]) -> Iterator[tuple[str, bool]]:
    """Yields each argument, and whether it is one of Hydra's flags or the value of one."""
    is_value = False
    for argument in arguments:
        yield argument, is_value or argument.startswith("-")
        is_value = argument in WITH_A_VALUE


def in_a_row(arguments: list[str]) -> list[str]:
    """Moves overrides that stand behind later flags to the first ones: Hydra takes one row."""
    marked = [*flagged(arguments)]
    first = next((place for place, (_, of_flag) in enumerate(marked) if not of_flag), 0)
    later = sorted(marked[first:], key=lambda each: each[1])
    return [argument for argument, _ in (*marked[:first], *later)]


def config_dir(flags: list[str]) -> str | None:
    """The folder of a person's own options, as --config-dir gives it; the last one counts."""
    found = None
    for place, flag in enumerate(flags):
        name, given, value = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            found = value if given else next(iter(flags[place + 1 :]), None)
    return found


def gather_paths(arguments: list[str]) -> list[str]:
    """Moves all arguments that are not overrides into one override, paths=[...]."""
    paths, rest = list[str](), list[str]()
    for argument, of_flag in flagged(arguments):
        is_path = not of_flag and ("=" not in argument or Path(argument).exists())
        (paths if is_path else rest).append(argument)
    return [*rest, f"paths={_quoted(paths)}"] if paths else rest


def with_run(arguments: list[str]) -> list[str]:
    """Writes a path without a key as run=..., and the run that a path means in place of others."""
    from diffusion_lab.runs.search import run_at  # late: --help need not wait for it

    found = []
    for argument, of_flag in flagged(arguments):
        key, _, path = argument.partition("=") if "=" in argument else ("run", "", argument)
        meant = key in ("run", "resume") and path and not of_flag and Path(path).exists()
        found.append(f"{key}={run_at(Path(path))}" if meant else argument)
    return found


def with_pretrained(argument: str) -> str:
    """An argument with the folder of a model that ships with the package, if it names one."""
    if "pretrained:" not in argument:
        return argument
    from diffusion_lab.runs import pretrained  # late: --help need not wait for it

    key, given, value = argument.rpartition("=")
    return f"{key}{given}{pretrained.local(value)}"


def apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into Hydra's flags with their values, as in --cfg job, and overrides."""
    overrides = [a for a in arguments if a.startswith("~") or ("=" in a and a[0] != "-")]
    return [argument for argument in arguments if argument not in overrides], overrides


def expand(several: list[str]) -> list[dict[str, str]]:
    """Every combination of the values, the last key changing fastest; [{}] if nothing varies."""
    parsed = parse(several)
    keys = [override.key_or_group for override in parsed]
    values = [list(override.sweep_string_iterator()) for override in parsed]
    return [dict(zip(keys, chosen, strict=True)) for chosen in product(*values)]


def _quoted(words: list[str]) -> str:
    """Writes a list of strings in Hydra's syntax."""
    quoted = ("'" + word.replace("'", "\\'") + "'" for word in words)
    return f"[{','.join(quoted)}]"
