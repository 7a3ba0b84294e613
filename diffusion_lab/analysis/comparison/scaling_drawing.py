"""The plot of scaling laws: points by size, the compute-optimal front, laws and their bands."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from diffusion_lab.analysis.comparison.families import Family
from diffusion_lab.analysis.comparison.scaling_laws import ScalingLaw, measured, on_front
from diffusion_lab.analysis.comparison.svg import INK, Drawing, colour, draw, look_of
from diffusion_lab.common.formats import amount
from diffusion_lab.metrics import Quantity


def draw_laws(
    families: Sequence[Family], laws: Mapping[str, ScalingLaw], metric: Quantity
) -> Drawing:
    """Draws a metric against training FLOPs: a line per size, and laws by names of families.

    A ring marks a point of the compute-optimal front. A law is drawn between points alone.
    """

    def paint(axes: Axes) -> None:
        for family in families:
            paint_sizes(axes, family, metric)
            if family.name in laws:
                paint_law(axes, laws[family.name], colour(family.look))
        axes.set(xlabel="training FLOPs, forward and backward", ylabel=metric.axis_title)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
        axes.xaxis.set_minor_formatter("")
        spent = [member.flops for family in families for member in family.members]
        reach = max(spent) / min(spent)
        # the names of sizes stand to the right of the last points
        axes.set_xlim(min(spent) / reach**0.05, max(spent) * reach**0.2)

    best = []
    for family in families:
        member = on_front(measured(family.members, metric), metric)[-1]
        value = metric.number(member.group.mean(metric.name))
        best.append(f"{family.name} {value}, with {member.size} and {amount(member.flops)} FLOPs")
    return draw(
        f"{metric.name}_scaling",
        f"{metric.title} against training FLOPs, by size of the network",
        f"Mean over seeds, a line for each size. The best: {'; '.join(best)}.",
        paint,
        {family.name: family.look for family in families},
        size=(7.2, 4.2),
        left=0.8,
    )


def paint_sizes(axes: Axes, family: Family, metric: Quantity) -> None:
    """Draws a line for each size, with its name at the end, and rings around the front."""
    members, kind, scale = measured(family.members, metric), metric.name, metric.scale
    for size in family.sizes:
        own = [member for member in members if member.size == size]
        if not own:
            continue
        x = [member.flops for member in own]
        y = [scale * member.group.mean(kind) for member in own]
        axes.plot(x, y, alpha=0.55, linewidth=0.9, markersize=4.5, **look_of(family.look))
        axes.annotate(
            size,
            (x[-1], y[-1]),
            (5, 7 if family.look % 2 else -7),  # apart from the names of the other family
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=colour(family.look),
        )
    front = on_front(members, metric)
    axes.plot(
        [member.flops for member in front],
        [scale * member.group.mean(kind) for member in front],
        linestyle="",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=0.8,
    )


def paint_law(axes: Axes, law: ScalingLaw, tint: str) -> None:
    """Draws a law along its compute-optimal front, with its interval at each place."""
    flops = law.flops
    if not len(flops):
        return
    axes.plot(flops, law.front(law.fitted)(flops), color=tint, linewidth=2.4)
    if ends := law.band(flops):
        axes.fill_between(flops, *ends, color=tint, alpha=0.18, linewidth=0)
