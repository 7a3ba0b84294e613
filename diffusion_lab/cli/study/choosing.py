"""The choice of values that a study tunes: what was tried, the best, and what lies beyond."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from diffusion_lab.cli.study.document import Settings
from diffusion_lab.cli.study.jobs import StudyJob, short
from diffusion_lab.common.files import read_json
from diffusion_lab.metrics.quantity import higher_is_better
from diffusion_lab.runs.files import SUMMARY

Tried = dict[str, Any]  # "values": settings, and "results": the metric by seed, None if it diverged


def written(values: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def result(trial: StudyJob, metric: str, measured: Mapping[str, float] | None) -> float | None:
    """The metric of a trial, of its training or `measured` later; None if it is not finite."""
    summary = read_json(trial.made / SUMMARY)
    if not summary.get("finished"):  # it diverged, maybe after it was stopped
        return None
    for name, value in (summary.get("metrics", {}) if measured is None else measured).items():
        if name == metric or name.startswith(f"{metric}/"):
            return value if math.isfinite(value) else None
    return None


def best(tried: Sequence[Tried], metric: str) -> Tried | None:
    """The best of what was tried, by its mean over seeds; None if every run diverged."""
    known = [each for each in tried if None not in each["results"].values()]
    sign = -1 if higher_is_better(metric) else 1
    return min(known, key=lambda each: sign * average(each), default=None)


def beyond(tried: Sequence[Tried], metric: str) -> list[Settings]:
    """The next values where the best is at an end of a grid, which goes on by its last factor."""
    found, new = best(tried, metric), []
    values: Settings = found["values"] if found else {}
    for key, value in values.items():
        grid = sorted({each["values"][key] for each in tried if not isinstance(value, str)})
        if len(grid) < 2 or value not in (grid[0], grid[-1]):
            continue
        further = short(value * value / ((grid[1] if value == grid[0] else grid[-2]) or math.inf))
        if all(isinstance(each, int) for each in grid):
            further = round(further)
        if further > 0 and not {further, -further} & {*grid}:  # -1 would have the folder of 1
            new.append(values | {key: further})
    return new


def average(tried: Tried) -> float:
    """The mean of the metric over seeds of what did not diverge."""
    return mean(tried["results"].values())
