"""The tuning before the compared runs: sentences on it, and its curves."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes

from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.names import names_of, varying
from diffusion_lab.analysis.comparison.svg import Drawing, colour, draw, look_of
from diffusion_lab.build.config_keys import CLASS, Settings
from diffusion_lab.common.formats import joined

TITLES = {"fid": "FID to validation images", "val/loss": "validation loss"}
LENGTH = ("budget.", "trainer.")  # start the keys of a run's length
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
        length = [facts["images"], *(each for each in self.overrides if each.startswith(LENGTH))]
        return facts["metric"], length, len(facts["seeds"]), sorted(facts["values"])

    @property
    def overrides(self) -> list[str]:
        """The overrides that made all runs differ from those of the study."""
        return self.facts.get("overrides", [])

    @property
    def runs(self) -> str:
        """The number of images of each run and its overrides, in words; empty without both."""
        images, overrides = self.facts["images"], self.overrides
        said = f" on {images:,} images" if images else ""
        said += f" with {joined(overrides)}" if overrides else ""
        return f", each{said}" if said else ""

    @property
    def of(self) -> list[str]:
        """The keys whose values were each tuned by themselves."""
        return self.facts.get("of", ["backbone"])

    @property
    def settings(self) -> Settings:
        """The settings of the composition below the keys in `of`."""
        parts = tuple(f"{key.replace('/', '.')}." for key in self.of)
        own = self.group.settings.items()
        return {key: value for key, value in own if f"{key}.".startswith(parts)}

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


def distinct(groups: Sequence[Group]) -> list[Tuned]:
    """One of each set that shares its tuning runs, such as compositions on more and less data.

    Their groups are named by what was tuned by itself, where that distinguishes them.
    """
    found: list[Tuned] = []
    for each in tuned_in(groups):
        if all(each.facts["tried"] != other.facts["tried"] for other in found):
            found.append(each)
    settings = [each.settings for each in found]
    if len(found) == 1:
        network = str(found[0].group.runs[0].settings.get(f"backbone.{CLASS}", ""))
        names = [network.rpartition(".")[2] or found[0].group.name]
    elif len({json.dumps(each, sort_keys=True) for each in settings}) < len(found):
        return found
    else:
        names = names_of(settings, varying(settings))
    return [
        replace(each, group=replace(each.group, name=name))
        for each, name in zip(found, names, strict=True)
    ]


def notes(groups: Sequence[Group]) -> Iterator[str]:
    """Yields sentences on what was tuned, or on what should have been."""
    tuned = tuned_in(groups)
    if not tuned:
        if any(key.startswith("backbone.") for group in groups for key in group.settings):
            yield "Nothing was tuned for each network: all have the values of one recipe"
        return
    if len(tuned) < len(groups):
        yield f"Only {len(tuned)} of {len(groups)} compositions were tuned"
    found, facts = distinct(groups), tuned[0].facts
    counts = sorted({len(each.facts["tried"]) for each in found})
    number = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1]))))
    each_of = joined(["network" if key == "backbone" else key for key in tuned[0].of])
    yield (
        f"Tuned for each {each_of} by {TITLES[facts['metric']]}: {', '.join(facts['values'])}, at "
        f"{number} values{tuned[0].runs}, with seed {', '.join(map(str, facts['seeds']))}"
    )
    if any(each.budget != tuned[0].budget for each in found):
        yield "Networks were tuned with unequal budgets, or by different metrics"
    for each in found:
        for key, best in each.facts["chosen"].items():
            if each.at_an_end(key):
                yield f"The best {key} of {each.group.name}, {best:g}, is at an end of its grid"


def drawings(groups: Sequence[Group]) -> list[Drawing]:
    """Draws the metric over the values of each tuned key, a line per network."""
    found = distinct(groups)
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
