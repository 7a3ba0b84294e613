"""What is plotted: figures along training, Pareto fronts, and figures against the training data."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from diffusion_lab.comparison.figures import Metric, training_flops
from diffusion_lab.comparison.groups import BETWEEN, DATA_SIZE, Group, Member
from diffusion_lab.comparison.statistics import half_width

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
    """A group's figure along training, at the images that all its seeds were measured at.

    `name` is that of the figure in metrics.jsonl; None, or none there: the final figures alone.
    """
    lines = [_points(member, kind, name) for member in group.members]
    lines = [line for line in lines if line]
    if not lines:
        return []
    common = sorted(set.intersection(*(set(line) for line in lines)))
    macs = group.mean("macs")
    points = []
    for images in common:
        values = [line[images][1] for line in lines]
        minutes = statistics.mean(line[images][0] for line in lines) / 60
        flops = training_flops(images, macs) if macs else None
        points.append(
            Point(images, minutes, flops, statistics.mean(values), min(values), max(values))
        )
    return points


def _points(member: Member, kind: str, name: str | None) -> dict[int, tuple[float, float]]:
    """images -> (seconds, value) of a run."""
    found = {
        row["images"]: (row["seconds"], row[name])
        for row in member.run.rows
        if name in row and math.isfinite(row[name])
    }
    if not found and kind in member.figures:
        seconds, images = member.run.training_seconds, member.run.summary["images_seen"]
        found = {images: (seconds, member.figures[kind])}
    return found


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """The places of (cost, figure) that nothing as cheap or cheaper betters, by cost."""
    sign = -1 if higher_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    best: list[int] = []
    for place in order:
        if not best or sign * points[place][1] < sign * points[best[-1]][1]:
            best.append(place)
    return best


@dataclass(frozen=True)
class DataLine:
    """One composition over parts of the data: training images, mean and half of the interval."""

    name: str
    group: Group  # of the most images, for its colour
    points: tuple[tuple[float, float, float], ...]


def data_lines(groups: Sequence[Group], kind: str) -> list[DataLine]:
    """Compositions that were trained on several parts of the data, each a line."""
    lines: dict[tuple, list[Group]] = {}
    for group in groups:
        if group.values("training_images") and group.values(kind):
            rest = {k: v for k, v in group.settings.items() if k not in DATA_SIZE}
            lines.setdefault(tuple(map(str, rest.items())), []).append(group)
    found = []
    for line in lines.values():
        line.sort(key=lambda group: group.mean("training_images"))
        if len(line) > 1:
            points = tuple(
                (
                    group.mean("training_images"),
                    group.mean(kind),
                    half_width(values) if len(values := group.values(kind)) > 1 else 0.0,
                )
                for group in line
            )
            found.append(DataLine(without_data(line[-1].name), line[-1], points))
    return found


def without_data(name: str) -> str:
    """A group's name without what it says of the part of the data."""
    words = [key.rpartition(".")[2] for key in DATA_SIZE]
    parts = [p for p in name.split(BETWEEN) if p.partition("=")[0].rpartition(".")[2] not in words]
    return BETWEEN.join(parts) or "all runs"


def crossings(lines: Sequence[DataLine], metric: Metric) -> list[str]:
    """A sentence on each pair of lines: where one passes the other, or that none does."""
    said = []
    for index, a in enumerate(lines):
        for b in lines[index + 1 :]:
            theirs = {images: mean for images, mean, _ in b.points}
            both = [(x, mean - theirs[x]) for x, mean, _ in a.points if x in theirs]
            places = [
                (x, y, before) for (x, before), (y, after) in pairwise(both) if before * after < 0
            ]
            for x, y, before in places:
                first = a if metric.better(before, 0) else b
                second = b if first is a else a
                said.append(
                    f"Between {x:,.0f} and {y:,.0f} training images {second.name} passes "
                    f"{first.name} in {metric.title}, by the means"
                )
            if both and not places:
                said.append(f"{a.name} and {b.name} do not cross in {metric.title}")
    return said
