"""What is plotted: figures along training, and Pareto fronts."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.groups import Group, Member
from diffusion_lab.backbone.macs import TRAINING_PASSES

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

    And at the end of each, also where these saw unequal numbers of images in equal time.
    `name` is that of the figure in metrics.jsonl; None, or none there: the final figures alone.
    """
    lines = [_points(member, kind, name) for member in group.members]
    lines = [line for line in lines if line]
    if not lines:
        return []
    common = sorted(set.intersection(*(set(line) for line in lines)))
    places = [[images] * len(lines) for images in common]
    ends = [max(line) for line in lines]
    if len(set(ends)) > 1:
        places.append(ends)
    points = []
    for place in places:
        reached = [line[images] for line, images in zip(lines, place, strict=True)]
        images = statistics.mean(place)
        minutes = statistics.mean(seconds for seconds, _ in reached) / 60
        values = [value for _, value in reached]
        flops = training_flops(group, images)
        points.append(
            Point(images, minutes, flops, statistics.mean(values), min(values), max(values))
        )
    return points


def training_flops(group: Group, images: float) -> float | None:
    """Of the network, forward and backward, over so many images; None if it is not known.

    Self-conditioning asks the network once more in half of the steps.
    """
    if not group.values("macs"):
        return None
    config = group.members[0].run.config
    twice = OmegaConf.select(config, "denoiser.self_conditioning")
    passes = TRAINING_PASSES + (0.5 if twice else 0)
    return 2 * passes * group.mean("macs") * images


def _points(member: Member, kind: str, name: str | None) -> dict[int, tuple[float, float]]:
    """images -> (seconds, value) of a run.

    The seconds are those of the step's first row: an evaluation's own is written once it is over.
    """
    reached: dict[int, float] = {}
    rows = [row for row in member.run.rows if {"images", "seconds"} <= row.keys()]
    for row in rows:
        reached[row["images"]] = min(row["seconds"], reached.get(row["images"], math.inf))
    found = {
        row["images"]: (reached[row["images"]], row[name])
        for row in rows
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
