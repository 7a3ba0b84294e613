"""What a comparison draws: figures by seed, along training, against cost and against the data."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from diffusion_lab.comparison.curves import AXES, DataLine, Point, front
from diffusion_lab.comparison.figures import Metric
from diffusion_lab.comparison.groups import Group
from diffusion_lab.comparison.statistics import half_width
from diffusion_lab.comparison.svg import INK, Drawing, colour, draw, marker
from diffusion_lab.profiling import amount

SMALL, BESIDE = (4.0, 2.9), 0.62  # inches, of plots that stand side by side


def by_seed(groups: Sequence[Group], metric: Metric) -> Drawing:
    """A row a group, the best on top: a mark a seed, a line for the interval of their mean."""
    order = [i for i in range(len(groups)) if groups[i].values(metric.kind)]
    order.sort(key=lambda i: groups[i].mean(metric.kind), reverse=metric.higher_is_better)
    scale = 100 if metric.percent else 1
    said = [f"{groups[i].name} {scale * groups[i].mean(metric.kind):.4g}" for i in order]

    def paint(axes: Axes) -> None:
        for row, index in enumerate(order):
            values = [scale * value for value in groups[index].values(metric.kind)]
            look = {"color": colour(index)}
            axes.plot(values, [row] * len(values), marker(index), alpha=0.75, **look)
            if len(values) > 1:
                mean, width = sum(values) / len(values), half_width(values)
                ends = [mean - width, mean, mean + width]
                axes.plot(ends, [row] * 3, "|-", markersize=9, mew=1.6, zorder=1, **look)
        floor = next((v for g in groups for v in g.values(f"{metric.kind}_floor")), None)
        if floor is not None:
            axes.axvline(scale * floor, color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
            axes.annotate(
                f"real images {scale * floor:.3g}",
                (scale * floor, 1),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if metric.higher_is_better else "left",
                fontsize=8,
            )
        axes.set_yticks(range(len(order)), [groups[i].name for i in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{axis_title(metric)}, {metric.direction}")

    return draw(
        f"{metric.kind}_by_seed",
        f"{metric.title} of each composition",
        f"Mean over seeds, best first: {'; '.join(said)}.",
        (9.0, 0.85 + 0.34 * len(order)),
        0.25 + 0.08 * max(len(groups[i].name) for i in order),
        paint,
    )


def axis_title(metric: Metric) -> str:
    """With its unit."""
    return metric.title + (" (%)" if metric.percent else "")


def along(
    curves: Sequence[tuple[Group, int, list[Point]]], metric: Metric, axis: str
) -> Drawing | None:
    """A figure against images, minutes or FLOPs: mean over seeds, and from lowest to highest."""
    lines = [
        (group, index, points)
        for group, index, points in curves
        if points and all(getattr(point, axis) is not None for point in points)
    ]
    if not lines:
        return None
    scale = 100 if metric.percent else 1

    def paint(axes: Axes) -> None:
        for group, index, points in lines:
            x = [getattr(point, axis) for point in points]
            mean, low, high = (
                [scale * getattr(point, part) for point in points]
                for part in ("mean", "low", "high")
            )
            look = {"color": colour(index), "marker": marker(index)}
            axes.plot(x, mean, markevery=max(1, len(x) // 8), **look)
            if len(points) == 1:
                axes.vlines(x, low, high, color=colour(index), linewidth=1.2)
            elif len(group.members) > 1:
                axes.fill_between(x, low, high, color=colour(index), alpha=0.15, linewidth=0)
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel(axis_title(metric))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))

    ends = "; ".join(
        f"{group.name} {scale * points[-1].mean:.4g} at {amount(getattr(points[-1], axis))}"
        for group, _, points in lines
    )
    return draw(
        f"{metric.kind}_against_{axis}",
        f"{metric.title} against {AXES[axis].partition(',')[0]}",
        f"Mean over seeds, with the range from the lowest to the highest. At the end: {ends}.",
        SMALL,
        BESIDE,
        paint,
        [(group.name, index) for group, index, _ in lines],
    )


def pareto(groups: Sequence[Group], metric: Metric, cost: str, label: str) -> Drawing | None:
    """A figure against a cost, and the line of those that nothing cheaper betters."""
    both = [
        (group, index)
        for index, group in enumerate(groups)
        if group.values(metric.kind) and group.values(cost)
    ]
    if len(both) < 2:
        return None
    scale = 100 if metric.percent else 1
    unit = 60 if cost == "training_seconds" else 1
    points = [(group.mean(cost) / unit, scale * group.mean(metric.kind)) for group, _ in both]
    best = front(points, metric.higher_is_better)

    def paint(axes: Axes) -> None:
        stairs = [points[place] for place in best]
        axes.plot(*zip(*stairs, strict=True), color=INK, linewidth=1, drawstyle="steps-post")
        for (_, index), (x, y) in zip(both, points, strict=True):
            look = {"color": colour(index), "marker": marker(index), "linestyle": ""}
            axes.plot([x], [y], markersize=7, **look)
        axes.set_xlabel(label)
        axes.set_ylabel(axis_title(metric))
        costs = [x for x, _ in points]
        if max(costs) > 5 * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.margins(0.12)

    names = "; ".join(both[place][0].name for place in best)
    return draw(
        f"{metric.kind}_by_{cost}",
        f"{metric.title} against {label.partition(',')[0]}",
        f"Not bettered by anything cheaper: {names}.",
        SMALL,
        BESIDE,
        paint,
        [(group.name, index) for group, index in both],
    )


def over_data(
    lines: Sequence[DataLine], indices: Sequence[int], metric: Metric, crossed: Sequence[str]
) -> Drawing:
    """A figure against the number of training images, on a logarithmic axis."""
    scale = 100 if metric.percent else 1

    def paint(axes: Axes) -> None:
        for line, index in zip(lines, indices, strict=True):
            x, mean, width = zip(*line.points, strict=True)
            axes.errorbar(
                x,
                [scale * value for value in mean],
                yerr=[scale * value for value in width],
                color=colour(index),
                marker=marker(index),
                capsize=3,
            )
        axes.set_xscale("log")
        axes.set_xlabel("training images")
        axes.set_ylabel(axis_title(metric))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))

    return draw(
        f"{metric.kind}_over_data",
        f"{metric.title} against training images",
        "; ".join(crossed) + ".",
        SMALL,
        BESIDE,
        paint,
        [(line.name, index) for line, index in zip(lines, indices, strict=True)],
    )
