"""What is compared: the figures of generated images, the held-out loss, memorisation, and costs."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.quantities import HELD_OUT, QUANTITIES


def judged_by(runs: Iterable[Run]) -> list[Quantity]:
    """The quantities that runs are compared by; last come those of metrics of other code."""
    known = {quantity.name: quantity for run in runs for quantity in run.extra_quantities}
    known = {quantity.name: quantity for quantity in QUANTITIES} | known
    return [quantity for quantity in known.values() if quantity.judged]


def names_of_figures(figures: list[dict[str, float]]) -> dict[str, str]:
    """The whole name of each kind, "fid" -> "fid/efficientnet_lite0-96/train10k-1k".

    Where runs have several, as with two classifiers, that which most of them have.
    """
    counts = Counter(name for each in figures for name in each)
    names: dict[str, str] = {}
    for name, _ in counts.most_common():
        names.setdefault(name.partition("/")[0], name)
    return names


def figures_of(run: Run, measured: dict[str, float], names: dict[str, str]) -> dict[str, float]:
    """By kind, whatever is known of a run: judgements, values of real images, spreads and costs."""
    found: dict[str, float | None] = {kind: measured.get(name) for kind, name in names.items()}
    found[HELD_OUT.name] = run.summary["metrics"].get("val/loss")
    found |= {
        "images_seen": run.summary["images_seen"],
        "parameters": run.summary["parameters"],
        "macs": run.summary["macs"],
        "images_per_second": images_per_second(run.rows),
        "training_seconds": run.training_seconds,
        "peak_memory": run.summary["peak_memory_bytes"],
        "training_images": run.summary["training_images"],
    }
    return {k: v for k, v in found.items() if v is not None and math.isfinite(v)}


def images_per_second(rows: list[dict]) -> float | None:
    """Of training: the median over its logged windows."""
    rates = [row["train/images_per_second"] for row in rows if "train/images_per_second" in row]
    return statistics.median(rates) if rates else None
