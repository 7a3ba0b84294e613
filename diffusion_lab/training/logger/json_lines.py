"""The logger that writes `metrics.jsonl`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from diffusion_lab.common.files import read_rows, write_atomically
from diffusion_lab.common.messages import say
from diffusion_lab.training.clock import Clock


class JSONLines(Logger):
    """Writes `metrics.jsonl`: one JSON object per row, flushed at once, readable after any crash.

    Rows that cannot be written are kept in memory and written with a later row.
    """

    def __init__(self, path: Path, clock: Clock):
        super().__init__()
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

    @rank_zero_only
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
        """Keeps only the first `count` rows, and sets the clock to the last of them.

        A resumed run writes the later rows again.
        """
        if not self.path.exists():
            return
        rows = [row for row in read_rows(self.path) if "step" in row][:count]
        self.count = len(rows)
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if rows:
            self.clock.continue_from(rows[-1]["seconds"])
