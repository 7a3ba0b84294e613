"""Weights & Biases as a logger that never holds training up."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from diffusion_lab.common.messages import say
from diffusion_lab.metrics import log_names
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.logger.reachability import why_offline

COLUMNS: list[str | int] = ["image", "class", "sample", "seed", "step", "images_seen"]
MOST_ROWS = 50  # rows of the table `samples`; each is a file, at every step with a grid
# the picture, its class (None without classes), its index among the samples of a seed, the seed
Sample = tuple[Image.Image, str | None, int, int]
FINISH_SECONDS = 60.0  # how long a run's end waits for its upload; the rest stays on the disk


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
        self._timed = (-1, 0.0)  # step of the latest metrics, and the seconds of its first row
        self.broken = False
        self.reason = why_offline(mode)
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        super().__init__(
            name=name,
            save_dir=str(run_dir.resolve()),  # W&B's own process may be in another folder
            project=project,
            id=run_id,
            group=group,
            tags=tags,
            mode="disabled" if disabled else "offline" if self.reason else "online",
            config=config | {"choices": dict(choices) if choices else None},
            settings=wandb.Settings(
                console="off", init_timeout=20, finish_timeout=FINISH_SECONDS, silent=True
            ),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning's default, about which W&B warns

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
        run.define_metric("*", step_metric=log_names.IMAGES, overwrite=True)  # replaces Lightning's

    def _guard(self, action: Callable[[], None]) -> None:
        if self.broken:
            return
        try:
            action()
        except Exception as error:
            self.broken = True
            if self._experiment is None:  # else Lightning would open it again, unguarded
                self._experiment = object()  # type: ignore[assignment]
            say(f"W&B failed and is not used for the rest of this run: {error}")

    @rank_zero_only
    def log_hyperparams(self, *arguments: object, **named: object) -> None:
        """Does nothing: the run gets the configuration when it is opened."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = step or 0
        row = self.clock.row(metrics, step)
        if step != self._timed[0]:
            self._timed = (step, row[log_names.SECONDS])
        self._log(row, step)

    def _log(self, row: dict[str, Any], step: int) -> None:
        """Adds values to a step's row; W&B's step is the optimiser's, also after a resume."""
        if step == self._timed[0]:
            row[log_names.SECONDS] = self._timed[1]  # else an evaluation would shift its time
        self._guard(lambda: self.experiment.log(row, step=step))

    @rank_zero_only
    def log_grid(self, key: str, path: Path, caption: str, step: int) -> None:
        """Logs one picture with its caption, as `grids/<key>`."""

        def log() -> None:
            with Image.open(path) as image:
                picture = wandb.Image(image, caption=caption)
                self._log(self.clock.row({f"{log_names.GRIDS}/{key}": picture}, step), step)

        self._guard(log)

    @rank_zero_only
    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Logs generated images of a step as rows of the table `samples`."""

        def log() -> None:
            table = wandb.Table(columns=COLUMNS)
            for image, *facts in samples:
                table.add_data(wandb.Image(image), *facts, step, step * self.clock.batch_size)
            with staged_in(self.run_dir / "wandb"):
                self._log(self.clock.row({log_names.SAMPLES: table}, step), step)

        self._guard(log)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Leaves the run open: the final metrics come after `fit`, and `finish` closes the run."""

    @rank_zero_only
    def finish(self, summary: dict | None) -> None:
        """Writes the final metrics to the run's summary and closes it; None marks a failure."""
        if self.broken:
            with contextlib.suppress(Exception):
                wandb.teardown()
            # else the next run of this process would write into this one
            wandb.sdk.lib.module.unset_globals()
            return

        def finish() -> None:
            self.experiment.summary.update(summary or {})
            self.experiment.finish(exit_code=0 if summary else 1)

        self._guard(finish)


def chosen(count: int, columns: int) -> list[int]:
    """The indices of at most MOST_ROWS of `count` images in a grid, leftmost columns first."""
    by_column = sorted(range(count), key=lambda i: (i % columns, i // columns))
    return sorted(by_column[:MOST_ROWS])


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Keeps a table's files in the run's folder until their upload, not in the user's home."""
    if wandb.env.DATA_DIR in os.environ:
        yield
        return
    os.environ[wandb.env.DATA_DIR] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[wandb.env.DATA_DIR]
