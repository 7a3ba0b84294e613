"""Messages for people: errors that are theirs to mend, and lines and bars on standard error."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
console = Console(stderr=True, highlight=False)  # standard output is for results


class UserError(ValueError):
    """Something asked for is wrong; the message says what, and what to write instead."""


class TrainingStopped(Exception):
    """Training cannot go on, on no rank; the message says why. Whoever trains adds what to do."""


def speak(aloud: bool) -> None:
    """Shows or hides all lines and bars of this process; another one may say the same."""
    console.quiet = not aloud


def say(line: str) -> None:
    """One line on standard error, as it is."""
    console.print(line, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A Rich bar of `total` steps on a terminal; yields the function that advances it by one."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = console.quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items, with a bar that each one moves when the next is asked for."""
    with progress_bar(description, len(items)) as advance:
        for item in items:
            yield item
            advance()
