"""Messages for users: errors that they can fix, and lines and bars on standard error."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk without room for what is written
# Plain lines in a notebook, as in a log file: Rich would show each as a page of its own, or, as the
# kernel asks for colours, take the notebook for a terminal. Elsewhere Rich decides, by None.
RICH = False if Console().is_jupyter else None
console = Console(  # standard output is for results
    stderr=True, highlight=False, emoji=False, force_jupyter=RICH, force_terminal=RICH
)


class UserError(ValueError):
    """The error for a wrong request; its message says what is wrong and what to write instead."""


class TrainingStopped(Exception):
    """The error that ends training on all ranks; it says why, and its handler adds what to do.

    With `final` the reason says what to do, and the run should not be resumed.
    """

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


def say(line: str) -> None:
    """Prints one line on standard error, without markup or wrapping; a full disk loses the line."""
    try:
        console.print(line, markup=False, soft_wrap=True)
    except OSError as error:  # training goes on without its lines
        if error.errno not in FULL:
            raise


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a Rich bar of `total` steps on a terminal; yields the function that advances it."""
    described = TextColumn("{task.description}")
    columns = described, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = console.quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yields the items, and advances a progress bar after each."""
    with progress_bar(description, len(items)) as advance:
        for item in items:
            yield item
            advance()


def package(name: str, extra: str, user: str) -> Any:
    """Imports the package `name`; if it is not installed, raises ValueError, naming its `user`."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{user} needs {name.replace('_', '-')}, which is not installed; run "
            f"`pip install 'diffusion-lab[{extra}]'`"
        ) from error
