"""How long a run has trained, and on how many images: the x-axes of its curves."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Clock:
    """Adds the x-axes to a row of metrics: what was trained, on how many images and how long.

    Validation is counted; what a Periodic callback does, pictures, figures and checkpoints, is not.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.start = time.monotonic()  # of training, shifted by what is not counted
        self.left_out = 0.0  # seconds
        self._stopped: float | None = None

    def continue_from(self, seconds: float, left_out: float = 0.0) -> None:
        """Counts on from what a run has taken before it was resumed."""
        self.start = time.monotonic() - seconds
        self.left_out = left_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stands still for a block."""
        self._stopped = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - self._stopped
            self.start += seconds
            self.left_out += seconds
            self._stopped = None

    def row(self, metrics: Mapping[str, Any], step: int) -> dict[str, Any]:
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        return row | {
            "images": step * self.batch_size,
            "seconds": round(self.seconds(), 3),
        }

    def seconds(self) -> float:
        """Of training so far, the time between being stopped and resumed left out."""
        return (self._stopped or time.monotonic()) - self.start
