"""Compositions by the size of the data that they were trained on: groups, lines and crossings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.labels import without_data
from diffusion_lab.analysis.comparison.significance import half_width
from diffusion_lab.analysis.comparison.svg import COLOURS
from diffusion_lab.build.config_keys import DATA_SIZE
from diffusion_lab.metrics import Quantity


@dataclass(frozen=True)
class DataSize:
    """The compositions of one part of the data, named without it.

    `images` says how many were trained on, as in "6,000"; empty where there is one part alone.
    """

    images: str
    groups: tuple[Group, ...]

    @property
    def label(self) -> str:
        return f"{self.images} training images" if self.images else ""


def parts_of(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each part of the data, from the least to the most; in the order given."""
    parts: dict[tuple, list[Group]] = {}
    for group in groups:
        parts.setdefault(group.data_size, []).append(group)
    return [parts[part] for part in sorted(parts, key=lambda p: (_images(parts[p]), str(p)))]


def by_data_size(groups: Sequence[Group]) -> list[DataSize]:
    """From the least data to the most; the groups of each in the order given."""
    parts = parts_of(groups)
    if len(parts) == 1:
        return [DataSize("", tuple(groups))]
    counts = [_images(part) for part in parts]
    found = []
    for part, count in zip(parts, counts, strict=True):
        images = f"{count:,.0f}" if count else "unknown"
        if counts.count(count) > 1:
            named = zip(DATA_SIZE, part[0].data_size, strict=True)
            images += f" ({', '.join(f'{k}={v}' for k, v in named if v is not None)})"
        own = [replace(group, name=without_data(group.name)) for group in part]
        found.append(DataSize(images, tuple(own)))
    return found


def _images(part: Sequence[Group]) -> float:
    """Trained on; of runs that do not say it, 0."""
    return next((g.mean("training_images") for g in part if g.values("training_images")), 0)


def arranged(groups: Sequence[Group]) -> list[Group]:
    """By size of the data, else in the order given, each with its look.

    With several sizes a composition has one colour at all of them, and another mark at each.
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
    """One composition over parts of the data: training images, mean and half of the interval."""

    name: str
    look: int
    points: tuple[tuple[float, float, float], ...]


def data_lines(groups: Sequence[Group], kind: str) -> list[DataLine]:
    """Compositions that were trained on several parts of the data, each a line."""
    lines: dict[str, list[Group]] = {}
    for group in groups:
        if group.values("training_images") and group.values(kind):
            lines.setdefault(group.apart_from_data, []).append(group)
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
            found.append(DataLine(without_data(line[-1].name), line[-1].look, points))
    return sorted(found, key=lambda line: line.look)


def crossings(lines: Sequence[DataLine], metric: Quantity) -> list[str]:
    """A sentence on each pair of lines, by their means: where one passes the other, or not."""
    return [sentence for a, b in combinations(lines, 2) for sentence in crossings_of(a, b, metric)]


def crossings_of(a: DataLine, b: DataLine, metric: Quantity) -> list[str]:
    """Of one pair; a point where both are equal is on neither side."""
    theirs = {images: mean for images, mean, _ in b.points}
    both = [(x, mean - theirs[x]) for x, mean, _ in a.points if x in theirs]
    if len(both) < 2:
        return []  # nothing lies between
    sides = [(x, gap) for x, gap in both if gap]
    if not sides:
        return [f"By the means, {a.name} and {b.name} are equal in {metric.title} at every size"]
    said = []
    for (x, before), (y, after) in pairwise(sides):
        if (before < 0) != (after < 0):
            first, second = (a, b) if metric.better(before, 0) else (b, a)
            said.append(
                f"By the means, {second.name} passes {first.name} in {metric.title} between "
                f"{x:,.0f} and {y:,.0f} training images"
            )
    if said:
        return said
    first, second = (a, b) if metric.better(sides[0][1], 0) else (b, a)
    ties = f", and equal at {len(both) - len(sides)}" if len(sides) < len(both) else ""
    return [
        f"By the means, {first.name} and {second.name} do not cross in {metric.title}: "
        f"{first.name} is better at {len(sides)} of {len(both)} sizes{ties}"
    ]
