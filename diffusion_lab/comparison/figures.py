"""What is compared: the figures of generated images, the held-out loss, memorisation, and costs."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from diffusion_lab.comparison.candidates import Run

HELD_OUT = "held_out_loss"
COPIES, PIXEL_COPIES = "copy_ratio", "pixel_copy_ratio"
JACKKNIFE = "fid_std"


@dataclass(frozen=True)
class Metric:
    """A figure by which compositions are judged."""

    kind: str
    title: str
    higher_is_better: bool
    percent: bool = False
    meaning: str = ""

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`."""
        return a > b if self.higher_is_better else a < b


METRICS = (
    Metric("fid", "FID", False, meaning="Fréchet distance of features to training images"),
    Metric("kid", "KID", False, meaning="squared MMD of features to training images"),
    Metric("precision", "Precision", True, meaning="share of samples among the real ones"),
    Metric("recall", "Recall", True, meaning="share of real images among the samples"),
    Metric("density", "Density", True, meaning="how densely samples lie among real images"),
    Metric("coverage", "Coverage", True, meaning="share of real images with a sample near"),
    Metric(
        "accuracy", "Accuracy", True, True, "samples that a classifier reads as the class asked for"
    ),
    Metric(HELD_OUT, "Held-out loss", False, meaning="denoising loss of test images"),
    Metric(
        COPIES, "Copies", False, meaning="samples too near to a training image, by what is expected"
    ),
    Metric(PIXEL_COPIES, "Copies by pixels", False, meaning="the same by distance of pixels"),
)


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
    """By kind, whatever is known of a run: judgements, floors, spreads and costs."""
    found = {kind: measured.get(name) for kind, name in names.items()}
    found[HELD_OUT] = run.summary.get("metrics", {}).get("val/loss")
    found |= {
        "images_seen": run.summary["images_seen"],
        "parameters": run.summary["parameters"],
        "macs": run.summary.get("macs"),
        "images_per_second": images_per_second(run.rows),
        "training_seconds": run.training_seconds,
        "peak_memory": run.summary.get("peak_memory_bytes"),
        "training_images": run.summary.get("training_images"),
    }
    return {kind: value for kind, value in found.items() if _finite(value)}


def images_per_second(rows: list[dict]) -> float | None:
    """Of training: the median over its logged windows."""
    rates = [row["train/images_per_second"] for row in rows if "train/images_per_second" in row]
    return statistics.median(rates) if rates else None


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
