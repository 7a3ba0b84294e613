"""Compositions by the size of their training data: groups, lines and crossings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.names import without_data
from diffusion_lab.analysis.comparison.svg import COLOURS
from diffusion_lab.metrics import Quantity


def parts_of(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each part of the data, the smallest part first; else in the order given."""
    parts: dict[tuple, list[Group]] = {}
    for group in groups:
        parts.setdefault(group.data_size, []).append(group)
    return [parts[part] for part in sorted(parts, key=lambda p: (images_of(parts[p]), str(p)))]


def images_of(part: Sequence[Group]) -> float:
    """The number of training images of a part of the data; 0 if its runs do not record it."""
    return next((g.mean("training_images") for g in part if g.values("training_images")), 0)


def arranged(groups: Sequence[Group]) -> list[Group]:
    """Sorts groups by the size of the data and gives each its colour and marker.

    With several sizes, a composition has one colour at all of them, and another marker at each.
    """
    parts = parts_of(groups)
    compositions = list(dict.fromkeys(g.apart_from_data for own in reversed(parts) for g in own))
    by_colour = len(parts) > 1 and len(compositions) <= len(COLOURS)
    found: list[Group] = []
    for number, part in enumerate(parts):
        for group in part:
            place = number * len(COLOURS) + compositions.index(group.apart_from_data)
            found.append(replace(group, look=place if by_colour else len(found)))
    return found


@dataclass(frozen=True)
class DataLine:
    """A composition over sizes of the data: points (training images, mean, half the interval)."""

    name: str
    look: int
    points: tuple[tuple[float, float, float], ...]


def data_lines(groups: Sequence[Group], kind: str) -> list[DataLine]:
    """A line for each composition that was trained on several parts of the data."""
    lines: dict[str, list[Group]] = {}
    for group in groups:
        if group.values("training_images") and group.values(kind):
            lines.setdefault(group.apart_from_data, []).append(group)
    found = []
    for line in lines.values():
        line.sort(key=lambda group: group.mean("training_images"))
        points = tuple(
            (group.mean("training_images"), group.mean(kind), group.half_width(kind) or 0.0)
            for group in line
        )
        if len(line) > 1:
            found.append(DataLine(without_data(line[-1].name), line[-1].look, points))
    return sorted(found, key=lambda line: line.look)


def crossings(lines: Sequence[DataLine], metric: Quantity) -> list[str]:
    """Sentences on each pair of lines: where their means cross, or that they do not cross."""
    return [sentence for a, b in combinations(lines, 2) for sentence in _crossings(a, b, metric)]


def _crossings(a: DataLine, b: DataLine, metric: Quantity) -> list[str]:
    """The sentences on a pair of lines; sizes at which both are equal count for neither."""
    theirs = {images: mean for images, mean, _ in b.points}
    both = [(x, mean - theirs[x]) for x, mean, _ in a.points if x in theirs]
    better = [(x, *((a, b) if metric.better(gap, 0) else (b, a))) for x, gap in both if gap]
    passed = [
        f"By the means, {second.name} overtakes {first.name} in {metric.title} between {x:,.0f} "
        f"and {y:,.0f} training images"
        for (x, first, second), (y, later, _) in pairwise(better)
        if first is not later
    ]
    if passed or len(both) < 2:  # one common size shows no crossing
        return passed
    if not better:
        return [f"By the means, {a.name} and {b.name} are equal in {metric.title} at every size"]
    _, first, second = better[0]
    ties = f", and equal at {len(both) - len(better)}" if len(better) < len(both) else ""
    return [
        f"By the means, {first.name} and {second.name} do not cross in {metric.title}: "
        f"{first.name} is better at {len(better)} of {len(both)} sizes{ties}"
    ]
