"""Draws what each value of one setting gave in a study's tuning, a panel for each network.

    python experiments/rates.py rates.png outputs/rates_by_width/{tune,tune-Muon}/tuning.json

A network that was tuned at several places of an axis, such as widths, has a line for each of them.
Points are the mean over the tuning seeds, dashes single seeds, and a circle is what was chosen.
What diverged is left out, and what is more than half above the least is cut off.
"""

import argparse
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diffusion_lab.cli.study.jobs import BETWEEN
from diffusion_lab.common.files import read_json
from diffusion_lab.report.figures import STYLE, look_of, paint_tuning


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    if missing := [str(path) for path in given.files if not path.is_file()]:
        parser.error(f"{missing[0]} does not exist; give tuning.json files of a study")
    panels: dict[str, dict[str, dict]] = {}
    for path in given.files:
        for name, part in read_json(path).items():
            arm, _, place = name.partition(BETWEEN)
            panels.setdefault(arm, {})[place] = part
    names = list(dict.fromkeys(place for lines in panels.values() for place in lines))
    with rc_context(STYLE | {"figure.facecolor": "white"}):
        figure = Figure((3.4 * len(panels) + 0.8, 3.4), dpi=120, layout="constrained")
        places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (arm, lines) in zip(places, panels.items(), strict=True):
            (setting,) = next(iter(lines.values()))["chosen"]
            paint_tuning(axes, setting, [(names.index(p), part) for p, part in lines.items()])
            axes.set_title(arm)
            axes.label_outer()
        least = min(min(line.get_ydata()) for axes in places for line in axes.get_lines())
        places[0].set_ylim(0.98 * least, 1.5 * least)
        handles = [Line2D([], [], **look_of(place)) for place in range(len(names))]
        figure.legend(handles, names, loc="outside right upper")
        FigureCanvasAgg(figure).print_png(str(given.picture))


if __name__ == "__main__":
    main()
