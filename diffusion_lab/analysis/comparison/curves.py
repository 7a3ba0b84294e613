"""The points of the plots: metrics along training, and Pareto fronts."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.backbone.macs import TRAINING_PASSES
from diffusion_lab.diffusion.objective.objective import SELF_CONDITIONED

AXES = {
    "images": "images seen",
    "minutes": "wall-clock time, minutes",
    "flops": "training FLOPs, forward and backward",
}


@dataclass(frozen=True)
class Point:
    """A mean over seeds at one number of images seen, with the lowest and highest seed."""

    images: float
    minutes: float
    flops: float | None
    mean: float
    low: float
    high: float


def curve(group: Group, kind: str, name: str | None) -> list[Point]:
    """A group's metric along training, at the numbers of images at which all seeds were measured.

    The last point is the end of all runs, even if they saw unequal numbers of images. `name` is the
    metric's name in metrics.jsonl; a run without such rows has its final value alone.
    """
    lines = [line for run in group.runs if (line := _points(run, kind, name))]
    if not lines:
        return []
    places = [[images] * len(lines) for images in sorted(set.intersection(*map(set, lines)))]
    ends = [max(line) for line in lines]
    if len(set(ends)) > 1:
        places.append(ends)
    points = []
    for place in places:
        reached = [line[images] for line, images in zip(lines, place, strict=True)]
        seconds, values = zip(*reached, strict=True)
        images, minutes = statistics.mean(place), statistics.mean(seconds) / 60
        spread = (statistics.mean(values), min(values), max(values))
        points.append(Point(images, minutes, training_flops(group, images), *spread))
    return points


def training_flops(group: Group, images: float) -> float | None:
    """FLOPs of training on `images` images, forward and backward; None if they are not known.

    Runs of earlier versions did not note their passes; then only self-conditioning is known, which
    calls the network once more in half of the steps.
    """
    first = group.runs[0]
    twice = OmegaConf.select(first.config, "denoiser.self_conditioning") or False
    passes = first.summary.get("forward_passes", TRAINING_PASSES + SELF_CONDITIONED * twice)
    if passes is None or not group.values("macs"):
        return None
    return 2 * passes * group.mean("macs") * images


def _points(run: Run, kind: str, name: str | None) -> dict[int, tuple[float, float]]:
    """A run's metric along training: number of images -> (seconds, value).

    The seconds are from a step's first row, as an evaluation writes its own row when it ends.
    """
    reached: dict[int, float] = {}
    rows = [row for row in run.rows if {"images", "seconds"} <= row.keys()]
    for row in rows:
        reached[row["images"]] = min(row["seconds"], reached.get(row["images"], math.inf))
    found = {
        row["images"]: (reached[row["images"]], row[name])
        for row in rows
        if name in row and math.isfinite(row[name])
    }
    if not found and kind in run.values and not run.drawn_elsewhere:
        final = (run.summary["training_seconds"], run.values[kind])
        return {run.summary["images_seen"]: final}
    return found


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """The Pareto front of points (cost, value): their indices, sorted by cost."""
    sign = -1 if higher_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    best: list[int] = []
    for place in order:
        if not best or sign * points[place][1] < sign * points[best[-1]][1]:
            best.append(place)
    return best
