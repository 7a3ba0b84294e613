"""The tuning before the compared runs: sentences on it, and its curves."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.svg import Drawing, colour, draw, look_of

TITLES = {"fid": "FID to validation images", "val/loss": "validation loss"}
Points = list[tuple[float, list[float]]]  # the values of a key in rising order, with their results


@dataclass(frozen=True)
class Tuned:
    """The tuning of a composition; `facts` are its configuration's, with what was tried."""

    group: Group
    facts: dict[str, Any]

    @property
    def budget(self) -> tuple:
        """The properties that should be equal for all compositions."""
        facts = self.facts
        return facts["metric"], facts["images"], len(facts["seeds"]), sorted(facts["values"])

    def curve(self, key: str) -> Points:
        """The results by value of a key, where the other keys have their chosen values.

        Values at which a run diverged are left out.
        """
        chosen, points = self.facts["chosen"], []
        for each in self.facts["tried"]:
            values, results = each["values"], list(each["results"].values())
            if None not in results and all(values[k] == chosen[k] for k in chosen if k != key):
                points.append((values[key], results))
        return sorted(points)

    def at_an_end(self, key: str) -> bool:
        """Whether the chosen value is the first or the last that was tried."""
        grid = [each["values"][key] for each in self.facts["tried"]]
        return self.facts["chosen"][key] in (min(grid), max(grid))


def tuned_in(groups: Sequence[Group]) -> list[Tuned]:
    """The tuning of each group that was tuned."""
    found = []
    for group in groups:
        facts = group.runs[0].part("tuning")
        if facts and facts.get("tried"):
            found.append(Tuned(group, facts))
    return found


def distinct(tuned: Sequence[Tuned]) -> list[Tuned]:
    """One of each set that shares its tuning runs, such as compositions on more and less data."""
    found: list[Tuned] = []
    for each in tuned:
        if all(each.facts["tried"] != other.facts["tried"] for other in found):
            found.append(each)
    return found


def notes(groups: Sequence[Group]) -> Iterator[str]:
    """Yields sentences on what was tuned, or on what should have been."""
    tuned = tuned_in(groups)
    if not tuned:
        if any(key.startswith("backbone.") for group in groups for key in group.settings):
            yield "Nothing was tuned for each network: all have the values of one recipe"
        return
    if len(tuned) < len(groups):
        yield f"Only {len(tuned)} of {len(groups)} compositions were tuned"
    found, facts = distinct(tuned), tuned[0].facts
    counts = sorted({len(each.facts["tried"]) for each in found})
    number = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1]))))
    images = f", each on {facts['images']:,} images" if facts["images"] else ""
    yield (
        f"Tuned for each network by {TITLES[facts['metric']]}: {', '.join(facts['values'])}, at "
        f"{number} values{images}, with seed {', '.join(map(str, facts['seeds']))}"
    )
    if any(each.budget != tuned[0].budget for each in found):
        yield "Networks were tuned with unequal budgets, or by different metrics"
    for each in found:
        for key, best in each.facts["chosen"].items():
            if each.at_an_end(key):
                yield f"The best {key} of {each.group.name}, {best:g}, is at an end of its grid"


def drawings(groups: Sequence[Group]) -> list[Drawing]:
    """Draws the metric over the values of each tuned key, a line per network."""
    found = distinct(tuned_in(groups))
    keys = dict.fromkeys(key for each in found for key in each.facts["values"])
    return [_drawing(key, [each for each in found if key in each.facts["values"]]) for key in keys]


def _drawing(key: str, tuned: Sequence[Tuned]) -> Drawing:
    metric = TITLES[tuned[0].facts["metric"]]

    def paint(axes: Axes) -> None:
        for each in tuned:
            look, best = each.group.look, each.facts["chosen"][key]
            points = {value: statistics.mean(results) for value, results in each.curve(key)}
            axes.plot(list(points), list(points.values()), **look_of(look))
            axes.plot([best], [points[best]], "o", ms=11, mfc="none", color=colour(look))
            for value, results in each.curve(key):
                axes.plot([value] * len(results), results, "_", color=colour(look), alpha=0.6)
        axes.set(xlabel=key, ylabel=metric, xscale="log")
        axes.set_xticks(sorted({value for each in tuned for value, _ in each.curve(key)}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")

    said = "; ".join(f"{each.group.name} {each.facts['chosen'][key]:g}" for each in tuned)
    return draw(
        f"tuning_{key.replace('.', '_')}",
        f"{metric} against {key}",
        f"The chosen values, circled: {said}.",
        paint,
        {each.group.name: each.group.look for each in tuned},
    )
