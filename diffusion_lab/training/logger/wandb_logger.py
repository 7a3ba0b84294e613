"""Weights & Biases, online or offline."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import wandb
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from diffusion_lab.common.ranges import Flag, one_of, settings
from diffusion_lab.first_stage.autoencoder.saving import FIRST_STAGE_FILE
from diffusion_lab.first_stage.trained import COPY_FOLDER
from diffusion_lab.runs import log_names
from diffusion_lab.runs.checkpoints import FILES, FOLDER, LAST, RANKED, SHARDS
from diffusion_lab.runs.files import CONFIG, METRICS, SUMMARY
from diffusion_lab.training.logger.run_logger import (
    MODES,
    GroupedLogger,
    Row,
    first_line,
    why_offline,
)

COLUMNS: list[str | int] = ["image", "class", "sample", "seed", "step", "images_seen"]
MOST_ROWS = 50  # rows of the table `samples`; each is a file, at every step with a grid
# the picture, its class (None without classes), its index among the samples of a seed, the seed
Sample = tuple[Image.Image, str | None, int, int]
# a run's end waits a minute for its upload; the rest stays on the disk
SETTINGS = wandb.Settings(console="off", init_timeout=20, finish_timeout=60.0, silent=True)


@settings
class WandB(GroupedLogger):
    """W&B, offline without a key or a network.

    With `checkpoints`, a finished run is uploaded as an artifact that opens as a run folder; with
    `console`, the lines that the run prints are logged, too.
    """

    title = "W&B"

    project: str = "diffusion-lab"
    mode: Annotated[str, one_of(*MODES)] = "auto"
    checkpoints: Flag = False
    console: Flag = False

    @property
    def facts(self) -> Row:
        """The arguments of wandb.init."""
        own = SETTINGS.model_copy(update={"console": "wrap" if self.console else "off"})
        facts = {"project": self.project, "name": self.name, "id": self.run_id, "resume": "allow"}
        more = {"group": self.group, "tags": self.tags, "config": self.config, "settings": own}
        return facts | more

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, as in Lightning's logger, for callbacks of others."""
        return self.run

    def open(self) -> str:
        # Lightning's own logger would have other x-axes
        run, reason = opened(why_offline(self.mode), self.run_dir, **self.facts)
        self.run = run
        for axis in log_names.AXES:
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric=log_names.IMAGES)
        # no summary=min of W&B: its panels do not read the {"min": ...} that it would leave
        if run.disabled:
            return "W&B: disabled"
        return offline(reason, self.run_dir) if reason else f"W&B: {run.url}"

    def write(self, row: Row, step: int) -> None:
        self.experiment.log(row, step=step)  # W&B's step is the optimiser's, also after a resume

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        with Image.open(path) as image:
            self.write(self.new({name: wandb.Image(image, caption=caption)}, step), step)

    @rank_zero_only
    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Logs generated images of a step as rows of the table `samples`."""
        self.guard(lambda: self._log_samples(samples, step))

    def _log_samples(self, samples: Sequence[Sample], step: int) -> None:
        table = wandb.Table(columns=COLUMNS)
        for image, *facts in samples:
            table.add_data(wandb.Image(image), *facts, step, step * self.clock.batch_size)
        with staged_in(self.run_dir / "wandb"):
            self.write(self.new({log_names.SAMPLES: table}, step), step)

    def close(self, summary: Row | None) -> None:
        self.experiment.summary.update(summary or {})
        if self.checkpoints and summary and summary["finished"]:
            name = f"checkpoints-{self.run_id}"
            with staged_in(self.run_dir / "wandb"):
                artifact = artifact_of(name, "model", self.run_dir, files_to_open(self.run_dir))
                self.experiment.log_artifact(artifact, aliases=[f"step-{summary['steps']}"])
        self.experiment.finish(exit_code=0 if summary else 1)

    @rank_zero_only
    def finish(self, summary: Row | None) -> None:
        super().finish(summary)
        if self.broken:
            with suppress(Exception):
                wandb.teardown()
            # else the next run of this process would write into this one
            wandb.sdk.lib.module.unset_globals()


def opened(reason: str | None, folder: Path, **facts: Any) -> tuple[wandb.Run, str | None]:
    """Opens a W&B run, offline if there is a reason or the server refuses; returns both."""
    facts.setdefault("settings", SETTINGS)
    facts["dir"] = str(folder.resolve())  # W&B's process may be elsewhere
    try:
        if os.environ.get("WANDB_MODE") == "disabled":
            return wandb.init(mode="disabled", **facts), reason
        return wandb.init(mode="offline" if reason else "online", **facts), reason
    except Exception as error:  # a wrong key, a proxy, a server that is down
        wandb.teardown()  # the same run id cannot be opened twice in one service
        run = wandb.init(mode="offline", **facts)
        return run, f"could not be reached: {first_line(error)}"


def offline(reason: str, folder: Path) -> str:
    """The line on an offline run of W&B: why it is offline, and how to upload it later."""
    upload = f"diffusion-lab sync {os.path.relpath(folder)}"
    return f"W&B: offline ({reason}); upload later with: {upload}"


def artifact_of(name: str, kind: str, folder: Path, files: Sequence[Path]) -> wandb.Artifact:
    """An artifact of files in a folder, under their names there."""
    artifact = wandb.Artifact(name, type=kind)
    for path in files:
        artifact.add_file(str(path), name=str(path.relative_to(folder)))
    return artifact


def files_to_open(run: Path) -> list[Path]:
    """The files of a run folder that are needed to open it, with the checkpoints that it keeps."""
    needed = (CONFIG, SUMMARY, METRICS, LAST, RANKED, FIRST_STAGE_FILE)
    found = [run / name for name in needed if (run / name).is_file()]
    kept = sorted([*(run / FOLDER).glob(FILES), *(run / FOLDER).glob(f"{SHARDS}_*/*")])
    return [*found, *kept, *(path for path in (run / COPY_FOLDER).rglob("*") if path.is_file())]


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
