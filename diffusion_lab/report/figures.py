"""Figures of a comparison, in one style: an arm has the same colour in all of them."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from diffusion_lab.common.formats import amount
from diffusion_lab.metrics.quantity import Quantity, higher_is_better
from diffusion_lab.report.arms import Arm
from diffusion_lab.report.facts import unequal
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.scaling import ScaledMetric, SizeSeries, front, on_front
from diffusion_lab.report.tests import Panel
from diffusion_lab.report.verdicts import number_of, numbers
from diffusion_lab.report.words import tuned_by

# dark enough for white paper; page.css has lighter ones for dark mode, in the same order
COLOURS = ("#0b5fa5", "#b8430a", "#14763a", "#7a2fc0", "#8a5a00", "#b3206b", "#0a6f78", "#51585f")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
INK, GRID = "#1b1f24", "#d4d9df"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text that can be searched and set in another font
    "svg.hashsalt": "diffusion_lab",  # the same file for the same drawing
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
}
AXES = {"images": "images seen", "minutes": "wall-clock time, minutes"}
COSTS = {"macs": "MACs per image", "training_seconds": "training time, minutes"}
SIZE = (4.1, 2.9)  # inches, for figures side by side
LETTER, ROW = 0.075, 0.3  # inches of a letter, and of an arm
MOST_LETTERS = 26  # of an arm's name beside an axis
Colours = Mapping[str, int]  # by the name of an arm's line


@dataclass(frozen=True)
class Drawing:
    """A figure as an SVG file, and in words for readers who cannot see it."""

    name: str
    title: str
    words: str
    file: str

    @cached_property
    def inline(self) -> str:
        """The figure for the page: in the theme's colours, with unique ids and a description."""
        svg = self.file[self.file.index("<svg") :]
        for place, fixed in enumerate(COLOURS):
            svg = svg.replace(fixed, f"var(--c{place})")
        svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
        svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
        name = self.name
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" style="max-width:{float(width) * 4 / 3:.0f}px" '
            f'role="img" aria-labelledby="{name}-t {name}-d"><title id="{name}-t">'
            f'{escape(self.title)}</title><desc id="{name}-d">{escape(self.words)}</desc>'
        )
        return head + svg[svg.index(">") + 1 :]


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def marker(place: int) -> str:
    """The marker of an arm, shifted in each round of colours: 64 arms all look different."""
    return [*MARKERS][(place + place // len(COLOURS)) % len(MARKERS)]


def look_of(place: int) -> dict[str, Any]:
    return {"color": colour(place), "marker": marker(place)}


def draw(
    name: str,
    title: str,
    words: str,
    paint: Callable[[Figure], None],
    legend: Colours = MappingProxyType({}),
    size: tuple[float, float] = SIZE,
    left: float = 0.62,
) -> Drawing:
    """Draws a figure of `size` inches, `left` of them for labels; below, a mark for each name."""
    with rc_context(STYLE):
        (width, height), below = size, 0.19 * len(legend)
        whole = height + below
        figure = Figure((width, whole))
        # margins by hand: a layout that measures every text takes longer than the drawing
        bottom, top = (0.5 + below) / whole, 1 - 0.45 / whole
        figure.subplots_adjust(left / width, bottom, 1 - 0.15 / width, top)
        paint(figure)
        edge = 6 / 72 / width
        figure.suptitle(title, x=edge, y=1 - 6 / 72 / whole, ha="left", va="top", fontsize=10)
        marks = [Line2D([], [], ls="", label=each, **look_of(at)) for each, at in legend.items()]
        if marks:
            style = {"frameon": False, "borderpad": 0, "handlelength": 1, "labelspacing": 0.4}
            figure.legend(handles=marks, loc="lower left", **style)
        text = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(text, metadata=empty)
    return Drawing(name, title, words, text.getvalue())


def _rows(
    name: str, title: str, panels: Sequence[Panel], paint: Callable[[Axes, Panel], None]
) -> Drawing:
    """Draws a row for each arm, the best on top, in a panel for each size of the data."""
    counts = [len(panel.arms) for panel in panels]

    def paint_all(figure: Figure) -> None:
        figure.subplots_adjust(hspace=1.1 / (ROW * sum(counts) / len(counts)))
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            paint(axes, panel)
            labels = _short(panel.arms)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            if panel.data:
                axes.set_title(f"{panel.data} training images")

    height = 0.95 + ROW * sum(counts) + 0.75 * (len(panels) - 1)
    left = 0.2 + LETTER * max(len(each) for panel in panels for each in _short(panel.arms))
    return draw(name, title, "", paint_all, size=(2.9 + left, height), left=left)


def _short(names: Sequence[str]) -> list[str]:
    more = "\N{HORIZONTAL ELLIPSIS}"
    cut = [each if len(each) <= MOST_LETTERS else each[: MOST_LETTERS - 1] + more for each in names]
    return cut if len({*cut}) == len(cut) else [*names]


def gaps(panels: Sequence[Panel], colours: Colours) -> Drawing | None:
    """Draws the gap of each arm to the best one, if any was tested; a full mark is a shown gap."""
    metric = panels[0].metric
    known = [panel for panel in panels if any(panel.pair(panel.arms[0], b) for b in panel.arms)]
    if not known:
        return None
    said = []

    def paint(axes: Axes, panel: Panel) -> None:
        axes.axvline(0, color=INK, linewidth=1)
        axes.plot([0], [0], markersize=6, **look_of(colours[panel.arms[0]]))
        for row, arm in enumerate(panel.arms):
            if (pair := panel.pair(panel.arms[0], arm)) is None:
                continue
            look = look_of(colours[arm])
            sign = metric.scale * (1 if pair.ahead == panel.arms[0] else -1)
            every, own = (pair.least, pair.most), (pair.low, pair.high)
            for bounds, width, alpha in ((every, 0.8, 1), (own, 3, 0.5)):
                ends = [sign * end for end in bounds]
                axes.plot(ends, [row] * 2, color=look["color"], lw=width, alpha=alpha)
            fill = look["color"] if pair.significant else "none"
            axes.plot([sign * pair.gap], [row], markersize=6, mfc=fill, **look)
            said.append(f"{arm} {sign * pair.gap:.3g}")
        axes.set_xlabel(f"{metric.axis_title} less that of {_short(panel.arms)[0]}")

    title = f"How far {metric.title} is from the best"
    drawn = _rows(f"{metric.name}_gaps", title, known, paint)
    words = "Thick: 95 % interval of the gap; thin: of all pairs at once; full marks: it is shown."
    return replace(drawn, words=f"{words} Gaps: {'; '.join(said)}.")


def runs(panels: Sequence[Panel], values: pd.DataFrame, colours: Colours) -> Drawing:
    """Draws each run, and from four runs on the interval of their mean."""
    metric = panels[0].metric
    known = {key: [*own] for key, own in values.groupby(["data", "arm"]).value}

    def paint(axes: Axes, panel: Panel) -> None:
        for row, (arm, mean) in enumerate(panel.means.iterrows()):
            own = [metric.scale * value for value in known[panel.data, arm]]
            look = look_of(colours[str(arm)])
            axes.plot(own, [row] * len(own), linestyle="", alpha=0.75, **look)
            ends = [mean.low, mean["mean"], mean.high] if len(own) > 3 else [mean["mean"]]
            ends = [metric.scale * end for end in ends]
            axes.plot(ends, [row] * len(ends), "|-", color=look["color"], ms=9, mew=1.6, zorder=1)
        if panel.real is not None:
            axes.axvline(metric.scale * panel.real, color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.set_xlabel(f"{metric.axis_title}, {metric.direction}")

    said = "; ".join(f"{arm} {value}" for panel in panels for arm, value in numbers(panel).items())
    dashed = " Dashed: real images." if panels[0].real is not None else ""
    drawn = _rows(f"{metric.name}_by_seed", f"{metric.title} of each run", panels, paint)
    return replace(drawn, words=f"Means: {said}.{dashed}")


def along(found: Collection, metric: Quantity, name: str, axis: str) -> Drawing | None:
    """Draws a metric, `name` on the way, along training: mean and range of runs that got there."""
    frame = found.frame.assign(minutes=found.frame.seconds / 60)
    before = frame[~frame.at_end & (frame.metric == name)]
    # a run has one value at its end, the mean over sampling seeds
    at_end = found.values(metric.name).merge(frame[frame.at_end][["arm", "seed", axis]].dropna())
    last = at_end.drop_duplicates(["arm", "seed"])
    lines = {}
    for arm in found.arms:
        ends = last[last.arm == arm.name]
        own = before[before.arm == arm.name]
        everyone = own.groupby("images").value.transform("size") == len(arm.runs)
        points = own[everyone].groupby("images")
        if len(ends) and len(points):
            x = [*points[axis].mean(), ends[axis].mean()]
            rows = points.value.agg(["mean", "min", "max"]).to_numpy()
            rows = np.vstack([rows, ends.value.agg(["mean", "min", "max"])]).T
            lines[arm.name] = arm.colour, x, metric.scale * rows
    if not lines:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel=AXES[axis], ylabel=metric.axis_title)
        for place, x, (mean, low, high) in lines.values():
            axes.plot(x, mean, markevery=max(1, len(x) // 8), **look_of(place))
            axes.fill_between(x, low, high, color=colour(place), alpha=0.15, linewidth=0)
        axes.set_xlim(left=0)
        _amounts(axes)

    ends_said = "; ".join(f"{arm} {rows[0][-1]:.4g}" for arm, (_, _, rows) in lines.items())
    words = f"Mean over runs, with the range. At the end: {ends_said}."
    if name != metric.name:
        words += " On the way: of validation images; the last point: of test images."
    title = f"{metric.title} against {AXES[axis].partition(',')[0]}"
    legend = {arm: place for arm, (place, _, _) in lines.items()}
    return draw(f"{metric.name}_against_{axis}", title, words, paint, legend)


def _amounts(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))


def pareto(means: pd.DataFrame, metric: Quantity, arms: Sequence[Arm]) -> Drawing | None:
    """Draws a metric against a cost, with the Pareto front; None if the costs are equal.

    `means` has a row for each arm, with the metric and the cost as columns.
    """
    both, cost = [arm for arm in arms if arm.name in means.index], means.columns[1]
    spent = [means[cost][arm.name] / (60 if cost == "training_seconds" else 1) for arm in both]
    if len(both) < 2 or not unequal(spent):
        return None
    values = [metric.scale * means[metric.name][arm.name] for arm in both]
    points = [*zip(spent, values, strict=True)]
    best = front(points, metric.higher_is_better)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel=COSTS[cost], ylabel=metric.axis_title)
        stairs = [points[place] for place in best]
        axes.plot(*zip(*stairs, strict=True), color=INK, linewidth=1, drawstyle="steps-post")
        for arm, (x, y) in zip(both, points, strict=True):
            axes.plot([x], [y], markersize=7, linestyle="", **look_of(arm.colour))
        _amounts(axes)
        axes.margins(0.12)

    names = "; ".join(both[place].name for place in best)
    words = (
        f"The line is the Pareto front, where nothing cheaper is better: {names}."
        if len(best) > 1
        else f"No other arm is cheaper than {names}, or better."
    )
    title = f"{metric.title} against {COSTS[cost].partition(',')[0]}"
    legend = {arm.name: arm.colour for arm in both}
    return draw(f"{metric.name}_by_{cost}", title, words, paint, legend)


def paint_tuning(axes: Axes, key: str, tuned: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Draws the metric of trials over the values of a key, a line for each network's place.

    The other keys have their chosen values. Values at which a run diverged are left out.
    """
    grid = sorted({each["values"][key] for _, part in tuned for each in part["tried"]})
    scale = "log" if grid[0] > 0 else "linear"
    axes.set(xlabel=key, ylabel=tuned_by(tuned[0][1]["metric"]), xscale=scale)
    for place, part in tuned:
        chosen, points, tint = part["chosen"], {}, colour(place)
        for each in part["tried"]:
            value, results = each["values"][key], [*each["results"].values()]
            if None not in results and each["values"] == chosen | {key: value}:
                points[value] = float(np.mean(results))
                axes.plot([value] * len(results), results, "_", color=tint, alpha=0.6)
        axes.plot(*zip(*sorted(points.items()), strict=True), **look_of(place))
        axes.plot([chosen[key]], [points[chosen[key]]], "o", ms=11, mfc="none", color=tint)
    axes.set_xticks(grid)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")


def tuning(key: str, tuned: Sequence[tuple[Arm, dict[str, Any]]]) -> Drawing:
    """Draws the trials of arms over the values of a key."""

    def paint(figure: Figure) -> None:
        paint_tuning(figure.add_subplot(), key, [(arm.colour, part) for arm, part in tuned])

    said = "; ".join(f"{arm.name} {part['chosen'][key]:g}" for arm, part in tuned)
    words = f"The chosen values, circled: {said}."
    name, title = key.replace(".", "_"), f"{tuned_by(tuned[0][1]['metric'])} against {key}"
    return draw(f"tuning_{name}", title, words, paint, {arm.name: arm.colour for arm, _ in tuned})


def searched(tuned: Sequence[tuple[Arm, dict[str, Any]]]) -> Drawing:
    """Draws the best of n random trials, in the mean over choices of them (arXiv:1909.03004).

    They are drawn with replacement; those that diverged count as the worst one.
    """
    metric = tuned_by(tuned[0][1]["metric"])

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="trials", ylabel=f"{metric}, best so far")
        for arm, part in tuned:
            sign = -1 if higher_is_better(part["metric"]) else 1
            results = [[*each["results"].values()] for each in part["tried"]]
            losses = sign * np.array(results, float).mean(1)
            losses = np.sort(np.nan_to_num(losses, nan=np.nanmax(losses)))
            counts = np.arange(1, len(losses) + 1)
            none_below = (1 - np.arange(len(losses) + 1) / len(losses))[:, None] ** counts
            best = sign * losses @ -np.diff(none_below, axis=0)
            axes.plot(counts, best, **look_of(arm.colour))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    words, title = "Means over choices with replacement.", f"{metric} against random trials"
    return draw("best_so_far", title, words, paint, {arm.name: arm.colour for arm, _ in tuned})


def laws(scaled: ScaledMetric) -> Drawing:
    """Draws a metric against training FLOPs: a line per size, and laws between their points."""
    metric = scaled.metric

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(ylabel=metric.axis_title, xscale="log")
        axes.set_xlabel("training FLOPs, forward and backward")
        for series in scaled.series:
            _paint_sizes(axes, series, metric)
            if law := scaled.laws.get(series.name):
                flops, tint = law.flops, colour(series.colour)
                axes.plot(flops, law.front(law.fitted)(flops), color=tint, linewidth=2.4)
                if ends := law.band(flops):
                    axes.fill_between(flops, *np.transpose(ends), color=tint, alpha=0.18, lw=0)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
        axes.xaxis.set_minor_formatter("")
        spent = pd.concat(series.points.flops for series in scaled.series)
        reach = max(spent) / min(spent)
        # the names of sizes stand to the right of the last points
        axes.set_xlim(min(spent) / reach**0.05, max(spent) * reach**0.2)

    best = []
    for series in scaled.series:
        point = on_front(series.points).iloc[-1]
        value, spent = number_of(metric, point["mean"]), amount(point.flops)
        best.append(f"{series.name} {value}, with {point['size']} and {spent} FLOPs")
    words = (
        "Mean over runs, a line for each size; a ring marks the compute-optimal front, and a thick "
        f"line a law along it. The best: {'; '.join(best)}."
    )
    title = f"{metric.title} against training FLOPs, by size of the network"
    legend = {series.name: series.colour for series in scaled.series}
    return draw(f"{metric.name}_scaling", title, words, paint, legend, (7.2, 4.2), 0.8)


def _paint_sizes(axes: Axes, series: SizeSeries, metric: Quantity) -> None:
    """Draws a line for each size, with its name at the end, and rings around the front."""
    place = series.colour
    for size, own in series.points.groupby("size", sort=False):
        x, y = [*own.flops], [*metric.scale * own["mean"]]
        axes.plot(x, y, alpha=0.55, linewidth=0.9, **look_of(place))
        # apart from the names of the other series
        aside = (5, 7 if place % 2 else -7)
        text = axes.annotate(str(size), (x[-1], y[-1]), aside, textcoords="offset points")
        text.set(va="center", fontsize=7, color=colour(place))
    best = on_front(series.points)
    x, y = best.flops, metric.scale * best["mean"]
    axes.plot(x, y, "o", markersize=9, mfc="none", mec=INK, mew=0.8)
