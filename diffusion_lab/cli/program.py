"""The program `diffusion-lab`: finds the command, and ends with an exit code instead of a trace."""

import os
import pkgutil
import select
import signal
import sys
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import diffusion_lab
from diffusion_lab.assembly.sentences import HYDRA_VERSION, MISTAKES, conf_dir, sentence
from diffusion_lab.cli.commands import MULTIRUN, OF_LINES, USAGE, command_named, prepare
from diffusion_lab.cli.help import help_of
from diffusion_lab.cli.job import STOPPED, fail, result_of, run
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute.started import end_with_launcher, let_rank_zero_speak

# Threads of a parallel loop that have ended wait for the others by spinning, GNU's by default for
# milliseconds: on a machine that others use, they take the processor from what they wait for.
SPINS = "20000"


def main() -> None:
    """Runs the console script; ends quietly if its output is closed early, as by `| head -1`."""
    let_rank_zero_speak()
    end_with_launcher()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        execute(sys.argv[1:])
    except BrokenPipeError:
        if not unread():  # another pipe broke
            raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on there is only an end to disturb
        try:
            print(end="", flush=True)  # else Python writes the rest after the last `try`
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def unread() -> bool:
    """Whether the reader of standard output has closed it, as far as the system can tell."""
    if not hasattr(select, "poll"):  # on Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll always reports errors
    return bool(poll.poll(0))


def execute(arguments: list[str]) -> None:
    """Runs the command that the arguments begin with; exits with a code above 0 if it fails."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["help"]:
        print(USAGE)
        return
    if arguments == ["--version"]:
        print(diffusion_lab.__version__)
        return
    if arguments[0] == "help":
        arguments = [arguments[1], "--help"]
    name, *rest = arguments
    sys.path.append(os.getcwd())  # for the user's own modules; last, to shadow nothing
    # makes Hydra raise errors instead of printing a trace itself
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if name == "study":
            # imported late, as its jobs are run by this module
            pkgutil.resolve_name("diffusion_lab.cli.study.command:study")(rest)
            return
        if (said := help_of(arguments)) is not None:
            print(said)
            return
        command = command_named(name)
        rest = prepare(command, rest)
        if command.trains and set(MULTIRUN) & set(rest):
            from diffusion_lab.cli.sweeps import sweep  # late: it waits for torch

            sweep(name, rest)
        else:
            run(name, rest)
    except MISTAKES as error:
        fail(sentence(error))
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except Exception as error:
        if not type(error).__module__.startswith("submitit"):
            raise
        fail(f"the job did not finish: {' '.join(str(error).split())}")


def command(name: str, *arguments: str) -> Any:
    """Runs a command of `diffusion-lab` in this process; returns what json=true would print.

    Arguments are written as on the command line, as in `command("train", "backbone=dit")`, and are
    overrides and paths: flags such as -m belong to the command line. A training command returns its
    `optimized_metric`, or None. Raises UserError with the sentence that the command line would
    print, and KeyboardInterrupt once a run that Ctrl-C has stopped is saved.
    """
    if name in OF_LINES:
        raise UserError(f"{name} is for the command line: diffusion-lab {name}")
    chosen, before = command_named(name), HydraConfig.instance().cfg
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise UserError(f"{flags[0]} is a flag of the command line; write overrides alone here")
    try:
        with initialize_config_dir(str(conf_dir()), **HYDRA_VERSION):
            overrides = prepare(chosen, list(arguments))
            whole = compose(name.replace("-", "_"), overrides, return_hydra_config=True)
            HydraConfig.instance().set_config(whole)
            cfg = whole.copy()
            with open_dict(cfg):
                del cfg["hydra"]
            return result_of(name, cfg)
    except MISTAKES as error:
        raise UserError(sentence(error)) from error
    except SystemExit as end:
        if end.code == STOPPED:
            raise KeyboardInterrupt from end
        raise
    finally:
        HydraConfig.instance().cfg = before
