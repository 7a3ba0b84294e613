"""Finds the command, runs it under Hydra, and turns what a user got wrong into one sentence."""

import importlib
import os
import shutil
import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from diffusion_lab.build.configuration import conf_dir
from diffusion_lab.build.sentences import sentence
from diffusion_lab.cli import outcomes
from diffusion_lab.cli.combinations import PLACES, admit, gather, gather_paths
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.compute import slurm

COMMANDS = {
    "train": "train a model, or with -m a sweep of them",
    "sample": "draw images from a trained run",
    "evaluate": "FID and its companions of a trained run",
    "compare": "runs side by side: table, plots, and a page with a verdict",
    "memorization": "does a trained run copy its training images?",
    "train-autoencoder": "train a first stage, for diffusion in its latents",
    "train-extractor": "train a classifier of the data, for metrics to use",
    "sample-sweep": "samplers, steps and guidance of a trained run against one another",
    "likelihood": "bits a dimension of test images",
    "encode": "images to noise and back",
    "inpaint": "draw the missing part of images anew",
    "export": "a trained model as a folder to give away",
    "doctor": "what is wrong with a training run, before it is made",
    "profile": "parameters, MACs, memory and speed of a composition",
    "match": "the size at which one backbone costs what another does",
    "sync": "upload offline W&B runs",
    "wandb-report": "a W&B workspace and a report that compare runs",
}
COMPOSED = (
    "train",
    "doctor",
    "train-autoencoder",
    "train-extractor",
    "profile",
    "match",
)  # the others take what is not chosen from a run
WITH_PATHS = ("compare", "sync")  # which take paths besides overrides
PATHS = ("run", "run_dir", "resume", "data_root", "output")
LAUNCHER = "hydra/launcher="
MULTIRUN = ("-m", "--multirun")
TRAINING = ("train", "train-autoencoder")  # sweeps of which go on where they were stopped
USAGE = """Usage: diffusion-lab COMMAND [override=value ...]

Commands:
{commands}

diffusion-lab COMMAND --help shows what can be overridden, --cfg job the whole configuration.
Quick start: diffusion-lab train experiment=quickstart"""


def main() -> None:
    """The console script `diffusion-lab`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        listed = "\n".join(f"  {name:<18}{what}" for name, what in COMMANDS.items())
        print(USAGE.format(commands=listed))
        return
    name, *rest = arguments
    if name not in COMMANDS:
        fail(f"there is no command {name!r}; use one of {', '.join(COMMANDS)}")
    sys.path.append(os.getcwd())  # networks and data of the user's; at the end, to shadow nothing
    # Hydra then raises, instead of printing a trace of its own making
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if "" in rest:
            raise UserError("one of the arguments is empty; leave it out, or write key=value")
        if name == "profile":
            rest = [argument for argument in rest if argument not in MULTIRUN]
        if name in ("sample-sweep", "profile"):
            flags, overrides = apart(rest)
            rest = [*flags, *gather(overrides)]
        if name in WITH_PATHS:
            rest = gather_paths(rest)
        if name not in COMPOSED:
            rest = [admit(argument) for argument in rest]
        elif any(argument.startswith("resume=") for argument in rest):
            rest = [admit(argument, ("data.",)) for argument in rest]
        if launcher := [argument for argument in rest if argument.startswith(LAUNCHER)]:
            check_launcher(launcher[-1].removeprefix(LAUNCHER))
            flags = {a.split("=")[0] for a in rest if a.startswith("-")}
            if flags <= set(PLACES):
                rest.append("-m")  # Hydra would run a single job here, without a word
        if name in TRAINING and set(MULTIRUN) & set(rest):
            sweep(name, rest)
        else:
            run(name, rest)
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(sentence(error, conf_dir()))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not type(error).__module__.startswith("submitit"):
            raise
        fail(f"the job was not run to its end: {' '.join(str(error).split())}")


def check_launcher(name: str) -> None:
    """Raises UserError where there is no SLURM to submit to."""
    if "slurm" in name and shutil.which("sbatch") is None:
        raise UserError(
            f"hydra/launcher={name} submits by SLURM's sbatch, which is not on the path; run this "
            "on a machine of the cluster, or leave hydra/launcher out"
        )


def apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, as in --cfg job, and the overrides."""
    overrides = [a for a in arguments if a.startswith("~") or ("=" in a and a[0] != "-")]
    return [argument for argument in arguments if argument not in overrides], overrides


def run(name: str, arguments: list[str]) -> None:
    """Hands the arguments to Hydra."""
    sys.argv = [f"diffusion-lab {name}", *arguments]
    command(name.replace("-", "_"))()


def sweep(name: str, arguments: list[str]) -> None:
    """A sweep over trainings, whose jobs are accounted for at its end, or where it was stopped."""
    flags, overrides = apart(arguments)
    check_params(overrides)
    folder = outcomes.new_sweep()
    if any(override.startswith("hparams_search=") for override in overrides):
        # for the file of the search
        names = [o.partition("=")[2] for o in overrides if o.startswith("study_name=")]
        (OUTPUTS / (names or ["search"])[-1]).parent.mkdir(parents=True, exist_ok=True)
    try:
        run(name, [*flags, *overrides, *outcomes.sweep_overrides(folder, overrides)])
    except ValueError:
        if not outcomes.none_done(folder):  # or Optuna finds no best trial
            raise
    finally:
        alone = [name, *(flag for flag in flags if flag not in MULTIRUN)]
        failed = outcomes.tell(folder, alone, say)
    if failed:
        sys.exit(1)


def check_params(overrides: list[str]) -> None:
    """Raises UserError for values that are written as a study's file has them, without a study."""
    given = [o for o in overrides if o.lstrip("+").startswith("hydra.sweeper.params")]
    if given and not any(override.startswith("+study=") for override in overrides):
        raise UserError(
            f"{given[0]} is how the file of a study says what it varies, and there is no "
            "+study=...; write the values themselves, as in seed=0,1"
        )


def command(name: str):
    """The Hydra application of a command: conf/<name>.yaml and `run` in its module."""
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)

    def job(cfg: DictConfig) -> float | None:
        # torch and lightning take seconds to import: not for --help or a typing error
        module = importlib.import_module(f"diffusion_lab.cli.{name}")
        for key in PATHS:
            if cfg.get(key) is not None:
                cfg[key] = str(cfg[key])  # a folder 2024 is a number to Hydra
        try:
            return module.run(cfg)  # the figure that a search is for, or nothing
        except KeyboardInterrupt:
            sys.exit(130)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            message = str(error) if isinstance(error, UserError) else sentence(error, conf_dir())
            if HydraConfig.get().mode == RunMode.RUN or slurm.tasks() > 1:
                fail(message)
            if slurm.started_by_srun():
                say(f"diffusion-lab: {message}")  # into the job's log
            raise  # at the sweep's end; its other jobs go on
        except Exception:
            if slurm.tasks() > 1:
                # Hydra would keep it, and this process would leave the others waiting
                traceback.print_exc()
                sys.exit(1)
            raise

    return application(job)


def say(line: str) -> None:
    """One line on standard error, as it is."""
    Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)


def fail(message: str) -> None:
    """One sentence on standard error, and exit code 2."""
    say(f"diffusion-lab: {message}")
    sys.exit(2)
