"""The values that a tuning tries, from a grid that grows at its ends or at random, and the best."""

import hashlib
import math
import random
from collections.abc import Sequence
from itertools import product
from statistics import mean
from typing import Any

from diffusion_lab.cli.study.document import Settings, StudyStage
from diffusion_lab.metrics.quantity import higher_is_better

Tried = dict[str, Any]  # "values": settings, and "results": the metric by seed, None if it diverged


def several(stage: StudyStage) -> dict[str, Any]:
    """The keys that a stage tunes, each with its grid or range."""
    return {key: each for key, each in stage.settings.items() if isinstance(each, list | dict)}


def first_values(stage: StudyStage, name: str) -> list[Settings]:
    """The values to begin with: all of a grid, or as many random ones as there are trials.

    Random values depend on the study's stage and on `name`, what is tuned, alone.
    """
    assert stage.choice is not None
    grids = several(stage)
    if stage.choice.trials is None:
        return [dict(zip(grids, each, strict=True)) for each in product(*grids.values())]
    drawn = []
    for trial in range(stage.choice.trials):
        text = f"{stage.name} {name} {trial}"
        draw = random.Random(hashlib.sha256(text.encode()).digest())
        drawn.append({key: _drawn(each, draw) for key, each in grids.items()})
    return drawn


def _drawn(values: Any, draw: random.Random) -> Any:
    if isinstance(values, list):
        return draw.choice(values)
    ((kind, (low, high)),) = values.items()
    if kind == "log":
        return _short(math.exp(draw.uniform(math.log(low), math.log(high))))
    return _short(draw.uniform(low, high))


def _short(value: float) -> float:
    """A value in three digits, so that 0.001 * 2 * 2 is 0.004."""
    return float(f"{value:.3g}")


def best(tried: Sequence[Tried], metric: str) -> Tried | None:
    """The best of what was tried, by its mean over seeds; None if every run diverged."""
    known = [each for each in tried if None not in each["results"].values()]
    sign = -1 if higher_is_better(metric) else 1
    return min(known, key=lambda each: sign * average(each), default=None)


def beyond(tried: Sequence[Tried], metric: str) -> list[Settings]:
    """The values to try next, because the best ones are at an end of a grid of numbers.

    A new value continues its grid by the factor between the two values at that end; a grid of
    whole numbers stays one.
    """
    found, new = best(tried, metric), []
    values: Settings = found["values"] if found else {}
    for key, value in values.items():
        grid = sorted({each["values"][key] for each in tried if not isinstance(value, str)})
        if len(grid) < 2 or value not in (grid[0], grid[-1]):
            continue
        further = _short(value * value / (grid[1] if value == grid[0] else grid[-2]))
        if all(isinstance(each, int) for each in grid):
            further = round(further)
        if further > 0 and further not in grid:
            new.append(values | {key: further})
    return new


def average(tried: Tried) -> float:
    """The mean of the metric over seeds of what did not diverge."""
    return mean(tried["results"].values())
