"""The table of commands: a command is a row here and a file conf/<name>.yaml."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command: `function` is the module:name of f(cfg, overrides) in this package, imported late.

    The function returns what `json=true` prints. If the command `trains`, the function returns the
    value that a search optimises instead, and a sweep ends with a report on all jobs.
    """

    help: str
    function: str
    run_groups: tuple[str, ...] = ()  # in these the run's own option is the default
    takes_paths: bool = False  # arguments that are no overrides fill the key `paths`
    combines: bool = False  # f has a third argument, all Combinations of comma-separated values
    trains: bool = False
    fails: Callable[[Any], bool] = lambda result: False  # whether a result makes the exit code 1


SAMPLING = ("sampler", "guidance")
MEASURING = (*SAMPLING, "metrics")
COMMANDS = {
    "train": Command(
        "train a model, or with -m a sweep of them", "cli.training_job:train_model", trains=True
    ),
    "sample": Command("draw images from a trained run", "analysis.sample:sample", SAMPLING),
    "evaluate": Command(
        "FID and its companions of a trained run", "analysis.evaluate:evaluate_run", MEASURING
    ),
    "compare": Command(
        "runs side by side: table, plots, and a page with a verdict",
        "analysis.comparison.comparing:compare_runs",
        takes_paths=True,
    ),
    "memorization": Command(
        "does a trained run copy its training images?",
        "analysis.memorization:memorization",
        MEASURING,
    ),
    "train-autoencoder": Command(
        "train a first stage, for diffusion in its latents",
        "cli.training_job:train_first_stage",
        trains=True,
    ),
    "train-extractor": Command(
        "train a classifier of the data, for metrics to use",
        "training.train_extractor:train_extractor",
    ),
    "sample-sweep": Command(
        "samplers, steps and guidance of a trained run against one another",
        "analysis.sample_sweep:sweep",
        MEASURING,
        combines=True,
    ),
    "likelihood": Command("bits a dimension of test images", "analysis.held_out_images:likelihood"),
    "encode": Command("images to noise and back", "analysis.held_out_images:encode_images"),
    "inpaint": Command(
        "draw the missing part of images anew", "analysis.held_out_images:inpaint", SAMPLING
    ),
    "export": Command("a trained model as a folder to give away", "runs.export:export"),
    "doctor": Command(
        "what is wrong with a training run, before it is made",
        "training.doctor.diagnosis:doctor",
        fails=lambda result: any(check["status"] == "error" for check in result["checks"]),
    ),
    "profile": Command(
        "parameters, MACs, memory and speed of a composition",
        "profiling.profile:profile",
        combines=True,
    ),
    "match": Command(
        "the size at which one backbone costs what another does", "profiling.match:match"
    ),
    "sync": Command("upload offline W&B runs", "analysis.wandb_sync:sync", takes_paths=True),
    "wandb-report": Command(
        "a W&B workspace and a report that compare runs", "analysis.wandb_report:wandb_report"
    ),
}
