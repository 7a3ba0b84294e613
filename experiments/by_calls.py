"""Draws FID against network calls from CSV files of experiments/sampled.py, a panel for each.

    python experiments/by_calls.py PICTURE FILE FILE ...

A line is the mean over the seeds of a run's name, with its 95 % interval where there are several.
All samplers must make one call a step. The dashed line is FID of real images.
"""

import argparse
import csv
import statistics
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from diffusion_lab.analysis.comparison.groups import half_width

MARKERS = "osD^vP"
ASIDE = 1.02  # the factor between neighbouring lines


def draw(axes: Axes, rows: list[dict[str, str]]) -> None:
    """A line for each run's name in the rows of one file."""
    markers = cycle(MARKERS)
    names = list(dict.fromkeys(row["run"] for row in rows))
    for place, name in enumerate(names):
        found: dict[int, list[float]] = {}
        for row in rows:
            if row["run"] == name:
                found.setdefault(int(row["steps"]), []).append(float(row["fid"]))
        calls = sorted(found)
        means = [statistics.mean(found[each]) for each in calls]
        bars = [half_width(found[each]) if len(found[each]) > 1 else 0 for each in calls]
        look = {"label": name, "marker": next(markers), "markersize": 4, "capsize": 2}
        # beside each other, as bars of equal means would hide one another
        shift = ASIDE ** (place - (len(names) - 1) / 2)
        axes.errorbar([each * shift for each in calls], means, bars, linewidth=1.2, **look)
    axes.axhline(float(rows[0]["fid_real"]), color="grey", linestyle="--", linewidth=1)
    axes.set(
        xscale="log", yscale="log", title=rows[0]["network"], xlabel="network calls per sample"
    )
    axes.set_xticks(sorted({int(row["steps"]) for row in rows}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    figure = Figure((4.6 * len(given.files), 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(given.files), sharey=True, squeeze=False)[0]
    for axes, path in zip(panels, given.files, strict=True):
        with path.open(newline="") as file:
            draw(axes, [row for row in csv.DictReader(file) if row["sweep"] == "trained"])
    panels[0].set_ylabel("FID")
    panels[0].legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(str(given.picture))


if __name__ == "__main__":
    main()
