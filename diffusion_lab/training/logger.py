"""Where metrics go: a plain JSON-lines file, always, and Weights & Biases.

Every row carries `images` (training images seen) and `seconds` (of training), so that curves of
different batch sizes, machines and numbers of pictures share an x-axis.
"""

import contextlib
import json
import netrc
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from diffusion_lab.common.files import read_rows, write_atomically
from diffusion_lab.common.progress import say
from diffusion_lab.metrics import log_names
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.samples_table import Sample, samples_table

MODES = ("auto", "online", "offline")
REACH_SECONDS = 2.0  # how long to look for the server before a run goes offline
FINISH_SECONDS = 60.0  # how long a run's end waits for its upload; the rest stays on the disk


class JSONLines(Logger):
    """`metrics.jsonl`: one JSON object a row, flushed at once, readable after any crash.

    Rows that cannot be written are kept, and written with a later one.
    """

    def __init__(self, path: Path, clock: Clock):
        super().__init__()
        self.path = path
        self.clock = clock
        self.count = 0  # rows logged so far
        self._unwritten: list[str] = []

    @property
    def name(self) -> str:
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        return self.path.parent.name

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        """The configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        row = json.dumps({"step": step} | self.clock.row(metrics, step)) + "\n"
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
        """Appends, all of it or nothing."""
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
        """Keeps the first rows; a run that goes on writes the others again. Sets the clock."""
        if not self.path.exists():
            return
        rows = [row for row in read_rows(self.path) if "step" in row][:count]
        self.count = len(rows)
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if rows:
            self.clock.continue_from(rows[-1]["seconds"])


class WandB(WandbLogger):
    """W&B that never holds training up: offline without a key or a network, silent once broken."""

    def __init__(
        self,
        run_dir: Path,
        clock: Clock,
        config: dict,
        name: str,
        group: str,
        run_id: str,
        project: str = "diffusion-lab",
        tags: list[str] | None = None,
        mode: str = "auto",
        choices: dict[str, str] | None = None,
    ):
        self.clock = clock
        self.run_dir = run_dir
        self._timed = (-1, 0.0)  # the step of the latest metrics, and the time of its first
        self.broken = False
        self.reason = reason = why_offline(mode)
        wandb_mode = "online" if reason is None else "offline"
        if os.environ.get("WANDB_MODE") == "disabled":
            wandb_mode = "disabled"
        super().__init__(
            name=name,
            save_dir=str(run_dir.resolve()),  # W&B's own process may be in another folder
            project=project,
            id=run_id,
            group=group,
            tags=tags,
            mode=wandb_mode,
            config=config | {"choices": choices},
            settings=wandb.Settings(
                console="off", init_timeout=20, finish_timeout=FINISH_SECONDS, silent=True
            ),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning's default, of which W&B warns

    @rank_zero_only
    def start(self) -> str:
        """Opens the run; returns the line to print: its address, or how to upload it later."""
        try:
            self._open()
        except Exception as error:  # a wrong key, a proxy, a server that is down
            self.reason = f"could not be reached: {str(error).splitlines()[0]}"
            wandb.teardown()  # the same run id cannot be opened twice in one service
            self._wandb_init["mode"] = "offline"
            self._experiment = None
            self._guard(self._open)
        if self.broken:
            return "W&B: could not be started; metrics.jsonl holds everything"
        if self.experiment.disabled:
            return "W&B: disabled"
        if self.reason is None:
            return f"W&B: {self.experiment.url}"
        folder = os.path.relpath(self.run_dir)
        return f"W&B: offline ({self.reason}); upload later with: diffusion-lab sync {folder}"

    def _open(self) -> None:
        run = self.experiment
        for axis in log_names.AXES:
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric=log_names.IMAGES, overwrite=True)  # Lightning's choice

    def _guard(self, action: Callable[[], None]) -> None:
        if self.broken:
            return
        try:
            action()
        except Exception as error:
            self.broken = True
            if self._experiment is None:  # Lightning would try again to open it, unguarded
                self._experiment = object()
            say(f"W&B failed and is left alone from here on: {error}")

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        """The configuration is given to the run when it opens."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        row = self.clock.row(metrics, step)
        if step != self._timed[0]:
            self._timed = (step, row[log_names.SECONDS])
        self._log(row, step)

    def _log(self, row: dict[str, object], step: int) -> None:
        """Adds to the step's row: W&B's step is the optimiser's, also in a run that goes on."""
        if step == self._timed[0]:
            row[log_names.SECONDS] = self._timed[1]  # or an evaluation would move the step's curves
        self._guard(lambda: self.experiment.log(row, step=step))

    @rank_zero_only
    def log_grid(self, key: str, path: Path, caption: str, step: int) -> None:
        """One picture with its caption, as `grids/<key>`."""

        def log() -> None:
            with Image.open(path) as image:
                picture = wandb.Image(image, caption=caption)
                self._log(self.clock.row({f"{log_names.GRIDS}/{key}": picture}, step), step)

        self._guard(log)

    @rank_zero_only
    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Generated images of a step, as rows of the table `samples`."""

        def log() -> None:
            table = samples_table(samples, step, step * self.clock.batch_size)
            with staged_in(self.run_dir / "wandb"):
                self._log(self.clock.row({log_names.SAMPLES: table}, step), step)

        self._guard(log)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Left open: the final metrics come after `fit`; `finish` closes the run."""

    @rank_zero_only
    def finish(self, summary: dict | None) -> None:
        """Writes the final figures to the run's summary and closes it; None: as failed."""
        if self.broken:
            with contextlib.suppress(Exception):
                wandb.teardown()
            # or the next run of this process would write into this one
            wandb.sdk.lib.module.unset_globals()
            return

        def finish() -> None:
            self.experiment.summary.update(summary or {})
            self.experiment.finish(exit_code=0 if summary else 1)

        self._guard(finish)


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Lets a table's files wait for their upload in the run's folder, not in the user's home."""
    if wandb.env.DATA_DIR in os.environ:
        yield
        return
    os.environ[wandb.env.DATA_DIR] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[wandb.env.DATA_DIR]


def why_offline(mode: str) -> str | None:
    """Why a run of this mode does not go to W&B's server, or None if it does."""
    if mode in ("online", "offline"):
        return "as asked" if mode == "offline" else None
    if os.environ.get("WANDB_MODE", "online") != "online":
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    return why_unreachable()


def why_unreachable() -> str | None:
    """Why nothing can be sent to W&B's server, or None."""
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(address.hostname):
        return "no API key; `wandb login` stores one"
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=REACH_SECONDS).close()
    except OSError:
        return f"no connection to {address.hostname}"
    return None


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
