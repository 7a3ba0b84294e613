"""The clock of a run, metrics.jsonl, and the base class of its other loggers."""

import json
import netrc
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.assembly.instantiate import Factory, check_keys, errors_at, instantiate
from diffusion_lab.common.files import read_rows, write_atomically
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import declared, settings
from diffusion_lab.runs import log_names
from diffusion_lab.runs.files import METRICS

MODES = ("auto", "online", "offline")
REACH_SECONDS = 2.0  # how long to look for the server before a run goes offline


def why_offline(mode: str) -> str | None:
    """Returns why a run of this mode does not go to W&B's server, or None if it does."""
    if mode in ("online", "offline"):
        return "as requested" if mode == "offline" else None
    if os.environ.get("WANDB_MODE", "online") != "online":
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    return why_unreachable()


def why_unreachable() -> str | None:
    """Returns why nothing can be sent to W&B's server, or None if it can."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    key: object = os.environ.get("WANDB_API_KEY")
    if not key:
        with suppress(OSError, netrc.NetrcParseError):
            key = netrc.netrc().authenticators(urlparse(url).hostname or "")
    return no_connection(url) if key else "no API key; `wandb login` stores one"


def no_connection(url: str) -> str | None:
    """Returns that nothing answers at the host and port of a URL, or None if something does."""
    address = urlparse(url)
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=REACH_SECONDS).close()
    except OSError:
        return f"no connection to {host}"
    return None


Row = dict[str, Any]
Result = TypeVar("Result")


class Clock:
    """Adds the x-axes to a row of metrics: images trained on, and seconds of training.

    Validation counts as training; Periodic callbacks (pictures, metrics, checkpoints) do not.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.start = time.monotonic()  # start of training, shifted by what does not count
        self.left_out = 0.0  # seconds that do not count
        self._stopped: float | None = None

    def continue_from(self, seconds: float, left_out: float) -> None:
        """Continues from the seconds that a run had taken before it was resumed."""
        self.start = time.monotonic() - seconds
        self.left_out = left_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the clock for a block."""
        self._stopped = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - self._stopped
            self.start += seconds
            self.left_out += seconds
            self._stopped = None

    def row(self, metrics: Mapping[str, Any], step: int) -> Row:
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        return row | {"images": step * self.batch_size, "seconds": round(self.seconds(), 3)}

    def seconds(self) -> float:
        """The seconds of training up to now, without the time between a stop and a resume."""
        return (self._stopped or time.monotonic()) - self.start


@settings
class RunLogger(Logger, ABC):
    """A logger on rank 0 that never stops training: its first failure is reported and ends it.

    It writes each name once a step, as dashboards have it. A resumed run continues after the step
    `resumed_from` of its checkpoint, 0 for a new run.
    """

    title: ClassVar[str]  # its name in messages

    run_dir: Path
    clock: Clock
    config: Row
    resumed_from: int

    def __post_init__(self) -> None:
        self.broken = False
        self._step = self.resumed_from  # the step of the latest row, and the names that it has
        rows = read_rows(self.run_dir / METRICS)  # before the run cuts them back to its checkpoint
        self._names = {name for row in rows if row.get("step") == self._step for name in row}

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> str:
        return self.run_dir.name

    @classmethod
    def require(cls) -> None:
        """Raises ValueError, in advance, if the logger cannot work here."""

    @abstractmethod
    def open(self) -> str:
        """Opens the run, and logs its configuration; returns a line on where it can be seen."""

    @abstractmethod
    def write(self, row: Row, step: int) -> None:
        """Writes the values of a row; the first row of a step has both x-axes."""

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        """Writes the picture in a file, where a logger has pictures."""

    def close(self, summary: Row | None) -> None:
        """Writes what is only known at the end, and closes the run; None marks a failure."""

    @rank_zero_only
    def start(self) -> str:
        """Opens the run; returns the line to print."""
        opened = self.guard(self.open)
        return opened or f"{self.title}: could not be started; {METRICS} holds everything"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = step or 0
        row = self.new(metrics, step)
        if step != self._step:
            self._step, self._names = step, set()
        self._names |= row.keys()
        if row:
            shown = {log_names.on_dashboards(name): value for name, value in row.items()}
            self.guard(lambda: self.write(shown, step))

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

    def guard(self, action: Callable[[], Result]) -> Result | None:
        """The result of an action, unless the logger is broken; if the action fails, it is."""
        if self.broken:
            return None
        try:
            return action()
        except Exception as error:  # of a server, a disk, or another library
            self.broken = True
            said = first_line(error.__cause__ or error)  # Lightning hides a full disk, for example
            say(f"{self.title} failed and is not used for the rest of this run: {said}")
            return None

    def log_hyperparams(self, *arguments: object, **named: object) -> None:
        """Does nothing: the run gets the configuration when it is opened."""


@settings
class GroupedLogger(RunLogger):
    """A logger whose runs have an id, by which a resumed run is found, a name, a group and tags."""

    run_id: str
    name: str | None = None  # None: that of the configuration, and the folder
    group: str | None = None
    tags: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or f"{self.config['name']}/{self.run_dir.name}"
        self.tags = [str(tag) for tag in as_list(self.tags)]  # Hydra reads 2024 as a number


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def numbers_of(summary: Row) -> Row:
    """The numbers of a run's summary, such as summary/parameters, without its metrics."""
    numbers = {key: value for key, value in summary.items() if type(value) in (int, float)}
    return {f"{log_names.SUMMARY}/{key}": value for key, value in numbers.items()}


class JSONLines(Logger):
    """Writes `metrics.jsonl`: one JSON object per row, flushed at once, readable after any crash.

    Rows that cannot be written are kept in memory and written with a later row.
    """

    def __init__(self, path: Path, clock: Clock):
        self.path = path
        self.clock = clock
        self.count = 0  # number of logged rows
        self._unwritten: list[str] = []

    @property
    def name(self) -> str:
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        return self.path.parent.name

    def log_hyperparams(self, *arguments: object, **named: object) -> None:
        """Writes nothing: the configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = json.dumps({"step": step, **self.clock.row(metrics, step or 0)}) + "\n"
        self._unwritten.append(row)
        self.count += 1
        try:
            self._write("".join(self._unwritten).encode())
        except OSError as error:
            if len(self._unwritten) == 1:
                say(
                    f"{self.path} cannot be written ({error.strerror}); its rows are kept in "
                    "memory until it can"
                )
        else:
            self._unwritten.clear()

    def _write(self, content: bytes) -> None:
        """Appends all of the content or nothing."""
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(end)
                raise

    @rank_zero_only
    def truncate(self, count: int) -> None:
        """Keeps only the first `count` rows."""
        if not self.path.exists():
            return
        rows = [row for row in read_rows(self.path) if "step" in row][:count]
        self.count = len(rows)
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def check_loggers(cfg: DictConfig) -> None:
    """Raises UserError for a logger that cannot work, before there is a run folder."""
    for key in keys_of(cfg):
        factory = instantiate(cfg, key)
        kind: Any = factory.target.func if isinstance(factory, Factory) else None
        if not (isinstance(kind, type) and issubclass(kind, RunLogger)):
            raise UserError(
                f"{key}._target_ must be a logger of this program, with _partial_; choose them by "
                "name, as in logger=[wandb,tensorboard]"
            )
        allowed = declared(kind)
        given = allowed.keys() & factory.settings.keys()  # earlier runs lack newer settings
        check_keys(cfg, {f"{key}.{name}": allowed[name] for name in given})
        with errors_at(cfg, key):
            kind.require()


def build_loggers(
    cfg: DictConfig, folder: Path, clock: Clock, resumed_from: int
) -> list[RunLogger]:
    """Builds the loggers of a run that has trained for `resumed_from` steps; none is started."""
    config = OmegaConf.to_container(cfg, resolve=True)
    facts = {"run_dir": folder, "clock": clock, "config": config, "resumed_from": resumed_from}
    return [instantiate(cfg, key)(**facts) for key in keys_of(cfg)]


def keys_of(cfg: DictConfig) -> list[str]:
    """The keys of the loggers in a configuration; none if their list is empty."""
    return [f"logger.{name}" for name in cfg.get("logger") or {}]
