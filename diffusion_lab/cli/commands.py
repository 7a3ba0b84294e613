"""The table of commands: a command is a row here, a line of USAGE and a file conf/<name>.yaml."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    "import": Command("importing.command:import_network", KINDS_CHOOSE, takes_paths=True),
    "export": Command("runs.export:export"),
    "doctor": Command("estimate.doctor:doctor", fails=found_errors),
    "profile": Command("estimate.profile:profile", combines=True),
    "plan": Command("estimate.plan:plan", combines=True, fails=does_not_fit),
    "match": Command("estimate.budget:match"),
    "sync": Command("analysis.wandb_sync:sync", takes_paths=True),
    "wandb-report": Command("analysis.wandb_pages:wandb_report", takes_paths=True, extra="report"),
}


def command_named(name: str) -> Command:
    """The command of this name; raises UserError if there is none."""
    if name not in COMMANDS:
        from diffusion_lab.assembly.sentences import instead  # late: --help needs no Hydra

        names = [*COMMANDS, "study", "options", "help"]
        raise UserError(f"there is no command {name!r}{instead(name, names)}")
    return COMMANDS[name]
