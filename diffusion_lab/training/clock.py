"""How long a run has trained, and on how many images: the x-axes of its curves."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Clock:
    """Adds the x-axes to a row of metrics: images trained on, and seconds of training.

    Validation counts as training; Periodic callbacks (pictures, metrics, checkpoints) do not.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.start = time.monotonic()  # start of training, shifted by what does not count
        self.left_out = 0.0  # seconds that do not count
        self._stopped: float | None = None

    def continue_from(self, seconds: float, left_out: float = 0.0) -> None:
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

    def row(self, metrics: Mapping[str, Any], step: int) -> dict[str, Any]:
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        return row | {"images": step * self.batch_size, "seconds": round(self.seconds(), 3)}

    def seconds(self) -> float:
        """The seconds of training up to now, without the time between a stop and a resume."""
        return (self._stopped or time.monotonic()) - self.start
