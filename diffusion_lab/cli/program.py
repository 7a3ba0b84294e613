"""The program `diffusion-lab`: finds the command, and ends with an exit code instead of a trace."""

import os
import pkgutil
import select
import signal
import sys

from diffusion_lab.build.sentences import MISTAKES, sentence
from diffusion_lab.cli.arguments import MULTIRUN, prepare
from diffusion_lab.cli.commands import COMMANDS, command_named
from diffusion_lab.cli.ending import STOPPED, fail
from diffusion_lab.cli.job import run
from diffusion_lab.compute.started import end_with_launcher, let_rank_zero_speak

STUDY_HELP = "run a study, from its question to its page"
USAGE = """Usage: diffusion-lab COMMAND [override=value ...]

Commands:
{commands}

`diffusion-lab COMMAND --help` explains a command and lists its options and keys.
Quick start: diffusion-lab train experiment=quickstart"""


def main() -> None:
    """Runs the console script `diffusion-lab`.

    If standard output is closed early, as by `| head -1`, the program ends quietly.
    """
    let_rank_zero_speak()
    end_with_launcher()
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
    """Whether the reader of standard output has closed it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll always reports errors
    return bool(poll.poll(0))


def execute(arguments: list[str]) -> None:
    """Runs the command that the arguments begin with; exits with a code above 0 if it fails."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        helps = {"study": STUDY_HELP} | {name: each.help for name, each in COMMANDS.items()}
        listed = "\n".join(f"  {name:<18}{words}" for name, words in helps.items())
        print(USAGE.format(commands=listed))
        return
    name, *rest = arguments
    sys.path.append(os.getcwd())  # for the user's own modules; last, to shadow nothing
    # makes Hydra raise errors instead of printing a trace itself
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if name == "study":
            # imported late, as its jobs are run by this module
            pkgutil.resolve_name("diffusion_lab.cli.study.command:study")(rest)
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
