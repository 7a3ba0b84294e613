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
import statistics
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from stated import rows_of

from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.quantity import REAL, quantity_of
from diffusion_lab.report.arms import COLOUR_OF
from diffusion_lab.report.figures import STYLE, look_of
from diffusion_lab.report.tests import half_width

ASIDE = 0.02  # between neighbouring lines, as a share of the axis or of a number
TITLES = {"steps": "network calls per sample", "calls": "network calls per sample"}


def draw(axes: Axes, rows: list[dict[str, str]], x: str, y: str, by: str, names: list[str]) -> None:
    """A line for each value of `by` in the rows; `names` are those of all panels."""
    quantity = quantity_of(y)
    log = axes.get_xscale() == "log"
    width = max(float(row[x]) for row in rows) - min(float(row[x]) for row in rows)
    for place, name in enumerate(names):
        found: dict[float, list[float]] = {}
        for row in rows:
            if row[by] == name:
                found.setdefault(float(row[x]), []).append(quantity.scale * float(row[y]))
        if not found:
            continue
        places = sorted(found)
        means = [statistics.mean(found[each]) for each in places]
        bars = [half_width(found[each]) if len(found[each]) > 1 else 0 for each in places]
        look = look_of(COLOUR_OF.get(name, place)) | {"label": name, "capsize": 2}
        # beside each other, as bars of equal means would hide one another
        aside = (place - (len(names) - 1) / 2) * ASIDE * min(1, 5 / len(names))
        shifted = [each * (1 + aside) if log else each + aside * width for each in places]
        axes.errorbar(shifted, means, bars, linewidth=1.2, **look)
    axes.axhline(quantity.scale * float(rows[0][f"{y}{REAL}"]), color="grey", linestyle="--")
    axes.set(xlabel=TITLES.get(x, x), ylabel=quantity.axis_title)
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
    where = f"sweep={given.sweep}" + f",{given.where}" * bool(given.where)
    try:
        rows = [row for path in given.files for row in rows_of(path, where)]
    except UserError as error:
        parser.error(str(error))
    columns = given.y.split(",")
    # accuracy is missing where no classifier was given
    columns = [each for each in columns if any(row.get(each) for row in rows)] or columns
    for column in (given.x, given.by, *columns):
        if not any(row.get(column) for row in rows):
            parser.error(f"no row of --sweep {given.sweep} {given.where} has {column}")
    if unknown := [column for column in columns if not quantity_of(column)]:
        parser.error(f"--y={unknown[0]} is no metric")
    with rc_context(STYLE | {"figure.facecolor": "white"}):
        paint(given, rows, columns)


def paint(given: argparse.Namespace, rows: list[dict[str, str]], columns: list[str]) -> None:
    """Draws all panels."""
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
