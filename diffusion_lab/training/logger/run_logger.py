"""The base class of a run's loggers besides metrics.jsonl, to which callbacks give pictures too."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from diffusion_lab.common.files import read_rows
from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import Range
from diffusion_lab.runs import log_names
from diffusion_lab.runs.files import METRICS
from diffusion_lab.training.clock import Clock

Row = dict[str, Any]


class RunLogger(Logger, ABC):
    """A logger on rank 0 that never stops training: its first failure is reported and ends it.

    Subclasses are loggers of Lightning's, too. They write each name once a step. A resumed run
    continues after the step `resumed_from` of its checkpoint, which is 0 for a new run.
    """

    title: ClassVar[str]  # its name in messages
    allowed: ClassVar[dict[str, Range]] = {}  # the ranges of settings that are checked in advance

    def __init__(self, run_dir: Path, clock: Clock, config: Row, resumed_from: int):
        self.run_dir = run_dir
        self.clock = clock
        self.config = config
        self.resumed_from = resumed_from
        self.broken = False
        self._step = resumed_from  # the step of the latest row, and the names that it has
        self._names = {name for row in self.past() if row["step"] == resumed_from for name in row}

    def past(self) -> list[Row]:
        """The rows of metrics.jsonl up to the checkpoint, before the run cuts them back to it."""
        rows = (row for row in read_rows(self.run_dir / METRICS) if "step" in row)
        return [row for row in rows if row["step"] <= self.resumed_from]

    @classmethod
    def require(cls) -> None:
        """Raises ValueError, in advance, if the logger cannot work here."""
        return None

    @abstractmethod
    def open(self) -> str:
        """Opens the run, and logs its configuration; returns a line on where it can be seen."""

    @abstractmethod
    def write(self, row: Row, step: int) -> None:
        """Writes the values of a row; the first row of a step has both x-axes."""

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        """Writes the picture in a file, where a logger has pictures."""
        return None

    def close(self, summary: Row | None) -> None:
        """Writes what is only known at the end, and closes the run; None marks a failure."""
        return None

    @rank_zero_only
    def start(self) -> str:
        """Opens the run; returns the line to print."""
        lines: list[str] = []
        self.guard(lambda: lines.append(self.open()))
        return "".join(lines) or f"{self.title}: could not be started; {METRICS} holds everything"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = step or 0
        row = self.new(metrics, step)
        if step != self._step:
            self._step, self._names = step, set()
        self._names |= row.keys()
        if row:
            self.guard(lambda: self.write(row, step))

    @rank_zero_only
    def log_grid(self, key: str, path: Path, caption: str, step: int) -> None:
        """Logs one picture with its caption, as `grids/<key>`."""
        self.guard(lambda: self.draw(f"{log_names.GRIDS}/{key}", path, caption, step))

    @rank_zero_only
    def finish(self, summary: Row | None) -> None:
        """Closes the run; None marks a failure."""
        self.guard(lambda: self.close(summary))

    def new(self, values: Mapping[str, Any], step: int) -> Row:
        """The values that no row of the step has yet, and both x-axes before its first row."""
        names = self._names if step == self._step else set()
        row = self.clock.row(values, step)
        return {name: value for name, value in row.items() if name not in names}

    def label(self) -> str:
        """The name of a run that is given none: the configuration's, and the folder."""
        return f"{self.config['name']}/{self.run_dir.name}"

    def guard(self, action: Callable[[], None]) -> None:
        """Calls an action unless the logger is broken; if it fails, the logger is."""
        if self.broken:
            return
        try:
            action()
        except Exception as error:  # of a server, a disk, or another library
            self.broken = True
            said = first_line(error.__cause__ or error)  # Lightning hides a full disk, for example
            say(f"{self.title} failed and is not used for the rest of this run: {said}")

    @rank_zero_only
    def log_hyperparams(self, *arguments: object, **named: object) -> None:
        """Does nothing: the run gets the configuration when it is opened."""
        return None

    @rank_zero_only
    def save(self) -> None:
        """Does nothing: every row is written at once."""
        return None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Leaves the run open: the final metrics come after `fit`, and `finish` closes the run."""
        return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def numbers_of(summary: Row) -> Row:
    """The numbers of a run's summary, such as summary/parameters, without its metrics."""
    numbers = {key: value for key, value in summary.items() if type(value) in (int, float)}
    return {f"{log_names.SUMMARY}/{key}": value for key, value in numbers.items()}
