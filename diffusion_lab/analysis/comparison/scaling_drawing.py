"""The plot of scaling laws: points by size, the compute-optimal front, laws and their bands."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from diffusion_lab.analysis.comparison.scaling_laws import ScalingLaw, measured, on_front
from diffusion_lab.analysis.comparison.size_series import SizeSeries
from diffusion_lab.analysis.comparison.svg import INK, Drawing, colour, draw, look_of
from diffusion_lab.common.formats import amount
from diffusion_lab.metrics import Quantity


def draw_laws(
    found: Sequence[SizeSeries], laws: Mapping[str, ScalingLaw], metric: Quantity
) -> Drawing:
    """Draws a metric against training FLOPs: a line per size, and laws by names of series.

    A ring marks a point of the compute-optimal front. A law is drawn between points alone.
    """

    def paint(axes: Axes) -> None:
        for series in found:
            paint_sizes(axes, series, metric)
            if series.name in laws:
                paint_law(axes, laws[series.name], colour(series.look))
        axes.set(xlabel="training FLOPs, forward and backward", ylabel=metric.axis_title)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
        axes.xaxis.set_minor_formatter("")
        spent = [member.flops for series in found for member in series.members]
        reach = max(spent) / min(spent)
        # the names of sizes stand to the right of the last points
        axes.set_xlim(min(spent) / reach**0.05, max(spent) * reach**0.2)

    best = []
    for series in found:
        member = on_front(measured(series.members, metric), metric)[-1]
        value = metric.number(member.group.mean(metric.name))
        best.append(f"{series.name} {value}, with {member.size} and {amount(member.flops)} FLOPs")
    return draw(
        f"{metric.name}_scaling",
        f"{metric.title} against training FLOPs, by size of the network",
        f"Mean over seeds, a line for each size. The best: {'; '.join(best)}.",
        paint,
        {series.name: series.look for series in found},
        size=(7.2, 4.2),
        left=0.8,
    )


def paint_sizes(axes: Axes, series: SizeSeries, metric: Quantity) -> None:
    """Draws a line for each size, with its name at the end, and rings around the front."""
    members, kind, scale = measured(series.members, metric), metric.name, metric.scale
    for size in series.sizes:
        own = [member for member in members if member.size == size]
        if not own:
            continue
        x = [member.flops for member in own]
        y = [scale * member.group.mean(kind) for member in own]
        axes.plot(x, y, alpha=0.55, linewidth=0.9, markersize=4.5, **look_of(series.look))
        axes.annotate(
            size,
            (x[-1], y[-1]),
            (5, 7 if series.look % 2 else -7),  # apart from the names of the other series
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=colour(series.look),
        )
    front = on_front(members, metric)
    x = [member.flops for member in front]
    y = [scale * member.group.mean(kind) for member in front]
    axes.plot(x, y, "o", markersize=9, mfc="none", mec=INK, mew=0.8)


def paint_law(axes: Axes, law: ScalingLaw, tint: str) -> None:
    """Draws a law along its compute-optimal front, with its interval at each place."""
    flops = law.flops
    if not len(flops):
        return
    axes.plot(flops, law.front(law.fitted)(flops), color=tint, linewidth=2.4)
    if ends := law.band(flops):
        axes.fill_between(flops, *ends, color=tint, alpha=0.18, linewidth=0)
