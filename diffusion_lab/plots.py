"""Plots, drawn without a display."""

from itertools import groupby
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def fid_against_calls(rows: list[dict], keys: list[str], path: Path) -> None:
    """FID over network calls, a line for each combination of the values of `keys`."""

    def label(row: dict) -> str:
        return ", ".join(f"{key}={row[key]}" if key != "sampler" else row[key] for key in keys)

    figure = Figure((7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="network calls a sample", ylabel="FID"
    )
    for name, group in groupby(sorted(rows, key=label), label):
        line = sorted(group, key=lambda row: row["calls"])
        axes.plot(
            [row["calls"] for row in line],
            [row["fid"] for row in line],
            marker="o",
            label=name or "the run's own sampling",
        )
    axes.axhline(rows[0]["fid_floor"], color="grey", linestyle="--", label="real images")
    axes.set_title(rows[0]["protocol"], fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    save(figure, path)
