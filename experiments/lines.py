"""Draws figures against a number from CSV files of experiments/sampled.py.

    python experiments/lines.py calls.png calls_unet.csv calls_dit.csv
    python experiments/lines.py scale.png guidance.csv --sweep guidance --x guidance.scale \\
        --y fid,accuracy,recall --by network --linear
    python experiments/lines.py sampler.png samplers.csv --sweep samplers --x calls --by sampler \\
        --where "sampler=ddim|heun|unipc"

There is a panel for each network and column of --y. A line is the mean over the seeds of one value
of --by, with its 95 % interval where there are several seeds. The dashed line is the value of real
images. Samplers of several calls a step need --x calls. --where chooses rows as in tables.py.
"""

import argparse
import csv
import statistics
from itertools import cycle
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from diffusion_lab.metrics.quantity import REAL, quantity_of
from diffusion_lab.report.tests import half_width

MARKERS = "osD^v<>PX*hd8"
COLOURS = colormaps["tab20"].colors  # pairs of a dark and a light one
ASIDE = 0.02  # between neighbouring lines, as a share of the axis or of a number
TITLES = {"steps": "network calls per sample", "calls": "network calls per sample"}


def rows_of(path: Path, sweep: str, where: str) -> list[dict[str, str]]:
    """The rows of a sweep in a file that have one of the values of each condition in `where`."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sweep"] == sweep]
    for condition in where.split(",") if where else ():
        name, _, values = condition.partition("=")
        rows = [row for row in rows if row.get(name) in values.split("|")]
    return rows


def draw(axes: Axes, rows: list[dict[str, str]], x: str, y: str, by: str, names: list[str]) -> None:
    """A line for each value of `by` in the rows; `names` are those of all panels."""
    quantity = quantity_of(y)
    log = axes.get_xscale() == "log"
    width = max(float(row[x]) for row in rows) - min(float(row[x]) for row in rows)
    for place, (name, marker) in enumerate(zip(names, cycle(MARKERS), strict=False)):
        found: dict[float, list[float]] = {}
        for row in rows:
            if row[by] == name:
                found.setdefault(float(row[x]), []).append(quantity.scale * float(row[y]))
        if not found:
            continue
        places = sorted(found)
        means = [statistics.mean(found[each]) for each in places]
        bars = [half_width(found[each]) if len(found[each]) > 1 else 0 for each in places]
        look = {"label": name, "marker": marker, "markersize": 4, "capsize": 2}
        # beside each other, as bars of equal means would hide one another
        aside = (place - (len(names) - 1) / 2) * ASIDE * min(1, 5 / len(names))
        shifted = [each * (1 + aside) if log else each + aside * width for each in places]
        color = COLOURS[(2 * place + place // 10) % len(COLOURS)]  # the dark ones first
        axes.errorbar(shifted, means, bars, linewidth=1.2, color=color, **look)
    axes.axhline(quantity.scale * float(rows[0][f"{y}{REAL}"]), color="grey", linestyle="--")
    axes.set(xlabel=TITLES.get(x, x), ylabel=quantity.axis_title)
    axes.grid(alpha=0.3)
    for axis in (axes.xaxis, axes.yaxis) if log else ():
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--sweep", default="trained", help="whose rows are drawn")
    parser.add_argument("--x", default="steps", help="a column of numbers")
    parser.add_argument("--y", default="fid", help="columns of metrics, with commas")
    parser.add_argument("--by", default="run", help="the column that names the lines")
    parser.add_argument("--where", default="", help="KEY=VALUE|VALUE,KEY=VALUE of the rows to draw")
    parser.add_argument("--linear", action="store_true", help="axes that are not logarithmic")
    given = parser.parse_args()
    rows = [row for path in given.files for row in rows_of(path, given.sweep, given.where)]
    columns = given.y.split(",")
    # accuracy is missing where no classifier was given
    columns = [each for each in columns if any(row.get(each) for row in rows)] or columns
    for column in (given.x, given.by, *columns):
        if not any(row.get(column) for row in rows):
            parser.error(f"no row of --sweep {given.sweep} {given.where} has {column}")
    if unknown := [column for column in columns if not quantity_of(column)]:
        parser.error(f"--y={unknown[0]} is no metric")
    parts: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        parts.setdefault("" if given.by == "network" else row["network"], []).append(row)
    panels = [(part, column) for part in parts for column in columns]
    beside = 1.6 * (len(panels) == 1)  # for the legend
    figure = Figure((4.6 * len(panels) + beside, 4), dpi=120, layout="constrained")
    places = figure.subplots(1, len(panels), sharey=len(columns) == 1, squeeze=False)[0]
    names = list(dict.fromkeys(row[given.by] for row in rows))
    handles = {}
    for axes, (part, column) in zip(places, panels, strict=True):
        scale = "linear" if given.linear else "log"
        axes.set(xscale=scale, yscale=scale, title=part if len(parts) > 1 else "")
        draw(axes, parts[part], given.x, column, given.by, names)
        if len(columns) == 1:
            axes.label_outer()
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    FigureCanvasAgg(figure).print_png(str(given.picture))


if __name__ == "__main__":
    main()
