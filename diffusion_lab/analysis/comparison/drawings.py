"""The plots of a comparison: metrics by seed, along training, against cost and size of the data."""

from collections.abc import Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from diffusion_lab.analysis.comparison.curves import AXES, Point, front
from diffusion_lab.analysis.comparison.data_sizes import DataLine, parts_of
from diffusion_lab.analysis.comparison.fairness import EQUAL_COST
from diffusion_lab.analysis.comparison.groups import Group, real_value
from diffusion_lab.analysis.comparison.svg import GRID, INK, Drawing, colour, draw, look_of
from diffusion_lab.common.formats import amount
from diffusion_lab.metrics import Quantity

ON_THE_WAY = (
    "A point before the end is not what a shorter run would reach: its learning rate and averaged "
    "weights belong to the longer run."
)


def by_seed(groups: Sequence[Group], metric: Quantity) -> Drawing:
    """Draws a row for each group, the best on top: its seeds and the interval of their mean.

    With several sizes of the data, rows are sorted by size first, from small to large.
    """
    sign = -1 if metric.higher_is_better else 1
    parts = parts_of([group for group in groups if group.values(metric.name)])
    for part in parts:
        part.sort(key=lambda group: sign * group.mean(metric.name))
    order = [group for part in parts for group in part]
    by = "best first" if len(parts) == 1 else "by size of the data, then best first"
    scale = metric.scale
    said = [f"{group.name} {scale * group.mean(metric.name):.4g}" for group in order]

    def paint(axes: Axes) -> None:
        for edge in list(accumulate(map(len, parts)))[:-1]:
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.7)
        for row, group in enumerate(order):
            values = [scale * value for value in group.values(metric.name)]
            axes.plot(values, [row] * len(values), linestyle="", alpha=0.75, **look_of(group.look))
            if (width := group.half_width(metric.name)) is not None:
                mean = group.mean(metric.name)
                ends = [scale * value for value in (mean - width, mean, mean + width)]
                tint = colour(group.look)
                axes.plot(ends, [row] * 3, "|-", color=tint, markersize=9, mew=1.6, zorder=1)
        if (real := real_value(groups, metric.name)) is not None:
            mark_real(axes, scale * real, metric)
        axes.set_yticks(range(len(order)), [group.name for group in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{metric.axis_title}, {metric.direction}")

    return draw(
        f"{metric.name}_by_seed",
        f"{metric.title} of each composition",
        f"Mean over seeds, {by}: {'; '.join(said)}.",
        paint,
        size=(9.0, 0.85 + 0.34 * len(order)),
        left=0.25 + 0.08 * max(len(group.name) for group in order),
    )


def mark_real(axes: Axes, value: float, metric: Quantity) -> None:
    """Draws a line at the value that real images have."""
    axes.axvline(value, color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
    axes.annotate(
        f"real images {value:.3g}",
        (value, 1),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if metric.higher_is_better else "left",
        fontsize=8,
    )


def along(
    curves: Sequence[tuple[Group, list[Point]]], metric: Quantity, axis: str
) -> Drawing | None:
    """Draws a metric against images, minutes or FLOPs: the mean and the range over seeds."""
    lines = [
        (group, points)
        for group, points in curves
        if points and all(getattr(point, axis) is not None for point in points)
    ]
    if not lines:
        return None
    scale = metric.scale

    def paint(axes: Axes) -> None:
        for group, points in lines:
            x = [getattr(point, axis) for point in points]
            mean, low, high = (
                [scale * getattr(point, part) for point in points]
                for part in ("mean", "low", "high")
            )
            axes.plot(x, mean, markevery=max(1, len(x) // 8), **look_of(group.look))
            if len(points) == 1:
                axes.vlines(x, low, high, color=colour(group.look), linewidth=1.2)
            elif len(group.runs) > 1:
                axes.fill_between(x, low, high, color=colour(group.look), alpha=0.15, linewidth=0)
        axes.set(xlabel=AXES[axis], ylabel=metric.axis_title)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: amount(value))

    ends = "; ".join(
        f"{group.name} {scale * points[-1].mean:.4g} at {amount(getattr(points[-1], axis))}"
        for group, points in lines
    )
    return draw(
        f"{metric.name}_against_{axis}",
        f"{metric.title} against {AXES[axis].partition(',')[0]}",
        f"Mean over seeds, with the range from the lowest to the highest. At the end: {ends}.",
        paint,
        {group.name: group.look for group, _ in lines},
    )


def pareto(groups: Sequence[Group], metric: Quantity, cost: str, label: str) -> Drawing | None:
    """Draws a metric against a cost, with the Pareto front.

    Returns None if the costs are equal, or known for fewer than two groups.
    """
    both = [group for group in groups if group.values(metric.name) and group.values(cost)]
    costs = [group.mean(cost) for group in both]
    if len(both) < 2 or max(costs) <= (1 + EQUAL_COST) * min(costs):
        return None
    scale = metric.scale
    unit = 60 if cost == "training_seconds" else 1
    means = [scale * group.mean(metric.name) for group in both]
    points = [(each / unit, mean) for each, mean in zip(costs, means, strict=True)]
    best = front(points, metric.higher_is_better)

    def paint(axes: Axes) -> None:
        stairs = [points[place] for place in best]
        axes.plot(*zip(*stairs, strict=True), color=INK, linewidth=1, drawstyle="steps-post")
        for group, (x, y) in zip(both, points, strict=True):
            axes.plot([x], [y], markersize=7, linestyle="", **look_of(group.look))
        axes.set(xlabel=label, ylabel=metric.axis_title)
        if max(costs) > 5 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: amount(value))
        axes.xaxis.set_minor_formatter("")
        axes.margins(0.12)

    names = "; ".join(both[place].name for place in best)
    return draw(
        f"{metric.name}_by_{cost}",
        f"{metric.title} against {label.partition(',')[0]}",
        f"Pareto front, where nothing cheaper is better: {names}.",
        paint,
        {group.name: group.look for group in both},
    )


def over_data(lines: Sequence[DataLine], metric: Quantity, crossed: Sequence[str]) -> Drawing:
    """Draws a metric against the number of training images, on a logarithmic axis."""
    scale = metric.scale

    def paint(axes: Axes) -> None:
        for line in lines:
            x, mean, width = zip(*line.points, strict=True)
            y, ends = ([scale * value for value in values] for values in (mean, width))
            axes.errorbar(x, y, yerr=ends, capsize=3, **look_of(line.look))
        axes.set(xlabel="training images", ylabel=metric.axis_title, xscale="log")
        axes.set_xticks(sorted({images for line in lines for images, _, _ in line.points}))
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: amount(value))

    return draw(
        f"{metric.name}_over_data",
        f"{metric.title} against training images",
        "; ".join(crossed or [f"Compositions: {', '.join(line.name for line in lines)}"]) + ".",
        paint,
        {line.name: line.look for line in lines},
    )
