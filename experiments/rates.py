"""Draws what each value of one setting gave in a study's tuning, a panel for each network.

    python experiments/rates.py rates.png outputs/rates_by_width/{tune,tune-Muon}/tuning.json

A network that was tuned at several places of an axis, such as widths, has a line for each of them.
Points are the mean over the tuning seeds, bars reach from the least to the largest of them, and a
large point is the one that was chosen. What diverged is left out, and what is more than half above
the least is cut off.
"""

import argparse
import statistics
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffusion_lab.cli.study.jobs import BETWEEN
from diffusion_lab.common.files import read_json
from diffusion_lab.report.figures import STYLE, look_of


def draw(axes: Axes, place: int, name: str, found: dict) -> None:
    """A line of what each value gave; `found` is the network's part of a tuning.json."""
    look = look_of(place) | {"label": name, "markerfacecolor": "white"}
    points = {}
    for tried in found["tried"]:
        (value,), results = tried["values"].values(), list(tried["results"].values())
        if None not in results:
            points[value] = results
    values = sorted(points)
    means = [statistics.mean(points[value]) for value in values]
    below = [mean - min(points[value]) for mean, value in zip(means, values, strict=True)]
    above = [max(points[value]) - mean for mean, value in zip(means, values, strict=True)]
    axes.errorbar(values, means, (below, above), **look)
    (best,) = found["chosen"].values()
    filled = look_of(place) | {"linestyle": ""}
    axes.plot([best], [means[values.index(best)]], markersize=8, zorder=3, **filled)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    networks = {name: part for path in given.files for name, part in read_json(path).items()}
    panels: dict[str, dict[str, dict]] = {}
    for name, part in networks.items():
        arm, _, place = name.partition(BETWEEN)
        panels.setdefault(arm, {})[place] = part
    names = sorted(
        {place for lines in panels.values() for place in lines}, key=lambda name: (len(name), name)
    )
    first = next(iter(networks.values()))
    (setting,) = first["chosen"]
    with rc_context(STYLE | {"figure.facecolor": "white"}):
        figure = Figure((3.4 * len(panels) + 0.8, 3.4), dpi=120, layout="constrained")
        places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (arm, lines) in zip(places, panels.items(), strict=True):
            axes.set(xscale="log", title=arm, xlabel=setting, ylabel=first["metric"])
            ticks = {
                v for part in lines.values() for t in part["tried"] for v in t["values"].values()
            }
            axes.set_xticks(sorted(ticks), [f"{each:g}" for each in sorted(ticks)])
            axes.minorticks_off()
            for place, part in lines.items():
                draw(axes, names.index(place), place, part)
            axes.label_outer()
        least = min(line.get_ydata().min() for axes in places for line in axes.get_lines())
        places[0].set_ylim(0.98 * least, 1.5 * least)
        handles = {}
        for axes in places:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend([handles[name] for name in names], names, loc="outside right upper")
        FigureCanvasAgg(figure).print_png(str(given.picture))


if __name__ == "__main__":
    main()
