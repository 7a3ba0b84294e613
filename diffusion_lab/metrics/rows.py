"""The metrics by which compositions are judged."""

from dataclasses import dataclass

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

    def number(self, value: float) -> str:
        """A value in three digits; shares in percent."""
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"

    def gap(self, *ends: float) -> str:
        """A gap or a width, or a range of them: 52, 47 to 57; in percentage points for shares."""
        scale = 100 if self.percent else 1
        return " to ".join(f"{scale * end:.3g}" for end in ends) + " points" * self.percent


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
