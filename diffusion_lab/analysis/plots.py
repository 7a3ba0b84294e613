"""Plots of memorisation and of sweeps, drawn without a display."""

from collections.abc import Iterator, Sequence
from itertools import cycle, groupby
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from diffusion_lab.common.files import replacing
from diffusion_lab.common.images import grid
from diffusion_lab.metrics.neighbours import MEANINGS, Neighbours
from diffusion_lab.metrics.quantity import REAL, Quantity

MARKERS = "osD^v<>PX*h"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def pairs(
    samples: Tensor, training: Tensor, spaces: dict[str, Neighbours], count: int, path: Path
) -> None:
    """Plots the `count` samples most like copies, by d1 / d2 in the first of `spaces`.

    Each cell has a sample and its nearest training image in each space; d1 and d2 are the distances
    to the two nearest. Images are uint8 (n, C, H, W), C of 1 or 3.
    """
    first = next(iter(spaces.values()))
    chosen = first.relative.argsort()[:count].tolist()
    columns = 4
    rows = -(-len(chosen) // columns)
    figure = Figure((2.6 * columns, 1.25 * rows + 0.6), dpi=120, layout="constrained")
    names = ", ".join(spaces)
    figure.suptitle(f"sample | nearest training image by {names}; below: d1 / d2", fontsize=9)
    for place, sample in enumerate(chosen):
        axes = figure.add_subplot(rows, columns, place + 1, xticks=[], yticks=[])
        images = [samples[sample]]
        images += [training[space.index[sample, 0]] for space in spaces.values()]
        strip = grid(torch.stack(images), len(images)).permute(1, 2, 0)
        axes.imshow(strip.expand(-1, -1, 3).numpy(), interpolation="nearest")
        ratios = " ".join(f"{space.relative[sample]:.2f}" for space in spaces.values())
        axes.set_xlabel(f"{sample}: {ratios}", fontsize=7)
        axes.spines[:].set_visible(False)
    save(figure, path)


def losses_by_level(losses: dict[str, dict[str, float]], path: Path) -> None:
    """Plots the denoising loss over the noise level, for training and test images."""
    figure = Figure((6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="t (0: data, 1: noise)", ylabel="loss", yscale="log")
    levels = [float(name.removeprefix("t")) for name in losses]
    for side, label in (("training", "training images"), ("test", "test images")):
        axes.plot(levels, [loss[side] for loss in losses.values()], marker="o", label=label)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save(figure, path)


def copies_along_training(steps: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """Plots shares of samples over steps: near copies, and those nearer to training images."""
    figure = Figure((11, 4), dpi=120, layout="constrained")
    shares = {"copies": 0.01, "nearer_to_training": 0.5}  # with what is expected without copies
    panels = figure.subplots(1, len(shares))
    for axes, (name, expected) in zip(panels, shares.items(), strict=True):
        for space in next(iter(steps.values())):
            values = [found[space][name] for found in steps.values()]
            axes.plot([*steps], values, marker="o", label=space)
        axes.axhline(expected, color="grey", linestyle="--", label="expected without copies")
        axes.set(xlabel="step", title=MEANINGS[name])
        axes.title.set_fontsize("small")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save(figure, path)


def lines_of(rows: list[dict], keys: list[str]) -> Iterator[tuple[str, list[dict]]]:
    """Yields a label for the legend and the rows for each combination of values of `keys`."""

    def label(row: dict) -> str:
        return ", ".join(f"{key}={row[key]}" if key != "sampler" else row[key] for key in keys)

    for name, group in groupby(sorted(rows, key=label), label):
        yield name, list(group)


def fid_against_calls(rows: list[dict], keys: list[str], path: Path) -> None:
    """Plots FID over network calls, with a line for each combination of values of `keys`."""
    figure = Figure((8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="network calls per sample", ylabel="FID"
    )
    markers = cycle(MARKERS)  # colours alone repeat after ten lines
    for marker, (name, line) in zip(markers, lines_of(rows, keys), strict=False):
        points = sorted((row["calls"], row["fid"]) for row in line)
        label = name or "the run's sampling"
        axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    axes.axhline(rows[0][f"fid{REAL}"], color="grey", linestyle="--", label="real images")
    for axis, ticks in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_title(rows[0]["protocol"], fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save(figure, path)


def against_number(
    rows: list[dict], key: str, keys: list[str], quantities: Sequence[Quantity], path: Path
) -> None:
    """Plots quantities over the numbers of a key, a line for each combination of the other keys."""
    others = [other for other in keys if other != key]
    figure = Figure((5.5 * len(quantities), 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        name, scale = quantity.name, quantity.scale
        for line, group in lines_of(rows, others):
            points = sorted((float(row[key]), scale * row[name]) for row in group if name in row)
            axes.plot(*zip(*points, strict=True), marker="o", label=line or None)
        if (real := rows[0].get(f"{name}{REAL}")) is not None:
            axes.axhline(scale * real, color="grey", linestyle="--", label="real images")
        axes.set(xlabel=key, title=f"{quantity.axis_title}, {quantity.direction}")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    save(figure, path)
