"""The table of commands: a command is a row here and a file conf/<name>.yaml."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusion_lab.common.messages import UserError


@dataclass(frozen=True)
class Command:
    """A command: `function` is the module:name of f(cfg, overrides) in this package, imported late.

    The function returns what `json=true` prints. If the command `trains`, the function returns the
    value that a search optimises instead, and a sweep ends with a report on all jobs.
    """

    help: str
    function: str
    run_groups: tuple[str, ...] = ()  # groups whose default is the run's option
    takes_paths: bool = False  # arguments that are not overrides fill the key `paths`
    on_all_devices: bool = False  # in a process per device, by the keys device and devices
    combines: bool = False  # f has a third argument, all Combinations of comma-separated values
    trains: bool = False
    fails: Callable[[Any], bool] = lambda result: False  # whether a result makes the exit code 1


SAMPLING = ("sampler", "guidance")
MEASURING = (*SAMPLING, "metrics")
# groups of which each kind of an import chooses the option
KINDS_CHOOSE = ("backbone", "first_stage", "schedule", "objective", "sampler")
COMMANDS = {
    "train": Command(
        "train a diffusion model, or several in a sweep (-m)",
        "cli.training_job:train_model",
        trains=True,
    ),
    "sample": Command(
        "generate images with a trained run",
        "analysis.sample:sample",
        SAMPLING,
        on_all_devices=True,
    ),
    "demo": Command(
        "show one or two runs drawing, on a page on this machine",
        "analysis.demo:demo",
        takes_paths=True,
    ),
    "evaluate": Command(
        "measure FID and other metrics of a trained run",
        "analysis.evaluate:evaluate_run",
        MEASURING,
        on_all_devices=True,
    ),
    "compare": Command(
        "compare runs in a table, plots, and a web page with a verdict",
        "analysis.compare:compare_runs",
        takes_paths=True,
    ),
    "publish": Command(
        "write a small folder with everything that checks a comparison of runs",
        "analysis.publishing:publish_runs",
        takes_paths=True,
    ),
    "status": Command(
        "show which runs wait, train, have ended or failed",
        "analysis.status:status",
        takes_paths=True,
    ),
    "memorization": Command(
        "check whether a trained run copies its training images",
        "analysis.memorization:memorization",
        MEASURING,
        on_all_devices=True,
    ),
    "train-autoencoder": Command(
        "train an autoencoder, for diffusion in its latents",
        "cli.training_job:train_first_stage",
        trains=True,
    ),
    "train-extractor": Command(
        "train a classifier on the data, for use by metrics",
        "training.train_extractor:train_extractor",
    ),
    "sample-sweep": Command(
        "compare samplers, steps and guidance scales for a trained run",
        "analysis.sample_sweep:sweep",
        MEASURING,
        on_all_devices=True,
        combines=True,
    ),
    "likelihood": Command(
        "measure bits per dimension of test images",
        "analysis.on_test_images:likelihood",
        on_all_devices=True,
    ),
    "encode": Command(
        "turn images into noise and back",
        "analysis.on_test_images:encode_images",
        on_all_devices=True,
    ),
    "inpaint": Command(
        "fill in the missing part of images",
        "analysis.on_test_images:inpaint",
        SAMPLING,
        on_all_devices=True,
    ),
    "average": Command(
        "averages of a run's weights of any length, after training", "analysis.average:average"
    ),
    "import": Command(
        "open published weights of DiT, SiT, EDM, ADM or diffusers like a run",
        "importing.command:import_network",
        KINDS_CHOOSE,
        takes_paths=True,
    ),
    "export": Command("save a trained model as a folder to share", "runs.export:export"),
    "doctor": Command(
        "check a training run before it starts",
        "estimate.doctor:doctor",
        fails=lambda result: any(check["status"] == "error" for check in result["checks"]),
    ),
    "profile": Command(
        "measure parameters, MACs, memory and speed of a composition",
        "estimate.profile:profile",
        combines=True,
    ),
    "plan": Command(
        "compute memory, time and disk of a training run on GPUs that are not here",
        "estimate.plan:plan",
        combines=True,
        fails=lambda result: any(
            each.get("fits") is False for each in result.get("plans", [result])
        ),
    ),
    "match": Command(
        "find the size at which one backbone costs as much as another", "estimate.budget:match"
    ),
    "sync": Command("upload offline W&B runs", "analysis.wandb_sync:sync", takes_paths=True),
    "wandb-report": Command(
        "create a W&B workspace and a report that compare runs",
        "analysis.wandb_pages:wandb_report",
        takes_paths=True,
    ),
}


def command_named(name: str) -> Command:
    """The command of this name; raises UserError if there is none."""
    if name not in COMMANDS:
        from diffusion_lab.assembly.sentences import instead  # late: --help needs no Hydra

        names = [*COMMANDS, "study", "options", "help"]
        raise UserError(f"there is no command {name!r}{instead(name, names)}")
    return COMMANDS[name]
