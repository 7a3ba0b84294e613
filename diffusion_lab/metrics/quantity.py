"""The one table of quantities by which runs are compared, for which torch is not needed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from diffusion_lab.common import hashing

HIGHER, LOWER = True, False  # which values of a quantity are better
REAL = "_real"  # ends the name of a value that is measured on test images instead of samples
BESIDE = (REAL, "_std")  # ends of names of values that stand beside another
FINGERPRINT = "fingerprint"
FILE = "FILE"  # in a protocol, the kind of reference whose statistics a file has
Protocol = dict[str, str | int]  # how values were measured; comparable if and only if equal


@dataclass(frozen=True)
class Quantity:
    """A number by which compositions are compared, as tables, plots and searches describe it."""

    name: str  # the first part of a result's name: fid, as in fid/inception/train60k-5k
    title: str
    meaning: str
    higher_is_better: bool
    percent: bool = False  # a share, which is printed as a percentage
    judged: bool = True  # whether `compare` judges by it
    tabled: bool = False  # whether its tables show it all the same
    signed: bool = False  # whether chance may take it below 0, as an unbiased estimate

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def axis_title(self) -> str:
        """The title with its unit."""
        return self.title + (" (%)" if self.percent else "")

    @property
    def scale(self) -> int:
        """The factor between a value and the number that is printed."""
        return 100 if self.percent else 1

    def text(self, value: float) -> str:
        """A value in four digits; a share as a percentage."""
        return f"{value:.1%}" if self.percent else f"{value:.4g}"

    def number(self, value: float) -> str:
        """A value in three digits; a share as a percentage."""
        return f"{self.scale * value:.3g}" + (" %" if self.percent else "")


def with_fingerprint(protocol: Protocol) -> Protocol:
    """Adds the first 12 digits of a protocol's sha256 to it, under "fingerprint"."""
    content = json.dumps(protocol, sort_keys=True)
    return protocol | {FINGERPRINT: hashing.of_text(content)[:12]}


FRECHET = "Fréchet distance of features to training images"
OF_SAMPLES = (
    Quantity("fid", "FID", FRECHET, LOWER),
    Quantity(
        *("fid_infinity", "FID-infinity", "FID, extrapolated to infinitely many samples", LOWER),
        judged=False,
    ),
    Quantity("kid", "KID", "squared MMD of features to training images", LOWER, signed=True),
    Quantity(
        *("mmd", "MMD", "CMMD's distance of the directions of features to training images", LOWER)
    ),
    Quantity("mind", "MIND", "sliced Wasserstein distance to training images", LOWER),
    Quantity(
        *("fld", "FLD", "surprise of test images under a density around the samples", LOWER),
        signed=True,
    ),
    Quantity("precision", "Precision", "share of samples that lie among real images", HIGHER),
    Quantity("recall", "Recall", "share of real images that lie among samples", HIGHER),
    Quantity("density", "Density", "density of samples among real images", HIGHER),
    Quantity("coverage", "Coverage", "share of real images with a sample nearby", HIGHER),
    Quantity(
        "spatial_fid",
        "Spatial FID",
        "Fréchet distance of a map of features to training images",
        LOWER,
        judged=False,
        tabled=True,
    ),
    Quantity(
        "seams",
        "Seams",
        "change across the edges of patches over the change inside, compared with real images",
        LOWER,
        judged=False,
        tabled=True,
    ),
    Quantity(
        "real_or_drawn",
        "Told apart",
        "how often a small network tells samples from real images; 50 % is perfect",
        LOWER,
        percent=True,
    ),
    Quantity(
        "inception_score",
        "Inception Score",
        "how confident a classifier is on each sample, and how varied samples are",
        HIGHER,
        judged=False,
    ),
    Quantity(
        "classifier_fid",
        "Classifier FID",
        "Fréchet distance of the classifier's features to training images",
        LOWER,
    ),
    Quantity(
        "accuracy",
        "Accuracy",
        "share of samples that a classifier assigns to the requested class",
        HIGHER,
        percent=True,
    ),
    Quantity("fid_class", "FID of class", f"{FRECHET} of a class", LOWER, judged=False),
)
# the names of metrics that are measured if the key of `metrics` is true
ON_REQUEST = ("mmd", "mind", "fld", "real_or_drawn")
TEST_LOSS = Quantity("test_loss", "Test loss", "denoising loss of test images", LOWER)
# runs may have been chosen by it, so compositions are not judged by it
VALIDATION_LOSS = Quantity(
    "validation_loss", "Validation loss", "denoising loss of validation images", LOWER, judged=False
)
BITS_PER_CODE = Quantity(
    "bits_per_code",
    "Bits per code",
    "exact, of the codes of test images",
    LOWER,
    judged=False,
    tabled=True,
)
COPIES = Quantity(
    "copy_ratio",
    "Copies",
    "samples too near to a training image, relative to the expected number",
    LOWER,
)
PIXEL_COPIES = Quantity(
    "pixel_copy_ratio", "Copies by pixels", "the same, by pixel distance", LOWER
)
QUANTITIES = (*OF_SAMPLES, TEST_LOSS, BITS_PER_CODE, COPIES, PIXEL_COPIES)
# whether higher is better
VALIDATION = {"val/loss": False, "val/bits_per_code": False, "val/psnr": True, "val/ssim": True}


def named(*names: str) -> tuple[Quantity, ...]:
    """The quantities of these names."""
    return tuple(quantity for quantity in OF_SAMPLES if quantity.name in names)


def quantity_of(name: str, extra: Sequence[Quantity] = ()) -> Quantity | None:
    """The quantity of a result such as fid/..., fid_class3 or rkid, or None if it is unknown.

    `extra` holds quantities of metrics from outside the package, whose own names may end in a
    number. The names of an autoencoder's reconstruction metrics begin with an r.
    """
    known = {quantity.name: quantity for quantity in (*QUANTITIES, *extra)}
    kind = name.partition("/")[0]
    of_class = kind.rstrip("0123456789")
    forms = (kind, kind.removeprefix("r"), of_class, of_class.removeprefix("r"))
    return next((known[form] for form in forms if form in known), None)


def higher_is_better(name: str, extra: Sequence[Quantity] = ()) -> bool | None:
    """Whether higher is better for a result of this name; None if that is not known."""
    if name in VALIDATION:
        return VALIDATION[name]
    quantity = quantity_of(name, extra)
    return None if quantity is None else quantity.higher_is_better


def report(
    values: dict[str, float], class_names: Sequence[str] = (), extra: Sequence[Quantity] = ()
) -> list[str]:
    """Returns the lines of a table: metrics, their values, those of real images, and full names.

    `extra` holds quantities of metrics from outside the package. Without metrics there is no line.
    """
    rows = [("metric", "value", "real images", "name")]
    for name in measured_of_samples(values):
        title = title_of(name.partition("/")[0], class_names, extra)
        rows.append((title, with_spread(values, name), real_beside(values, name), name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return lines if len(lines) > 1 else []


def title_of(name: str, class_names: Sequence[str], extra: Sequence[Quantity]) -> str:
    """The title of a metric, with a class's name after its number: FID of class 3 (Dress)."""
    quantity = quantity_of(name, extra)
    if quantity is None:
        return name.capitalize()
    r = "" if name.startswith(quantity.name) else "r"  # the metric is of reconstructions
    label = name.removeprefix(f"{r}{quantity.name}")
    if not label:
        return f"{r}{quantity.title}"
    known = class_names[int(label)] if int(label) < len(class_names) else label
    # classes without names are named by their numbers
    return f"{r}{quantity.title} {label}" + ("" if known == label else f" ({known})")


def ceiling(values: dict[str, float], first_stage: dict[str, float]) -> dict[str, float]:
    """The reconstruction metrics of a first stage that were measured in the same way as `values`.

    A model in the latents of the first stage should not be expected to do better. If none was
    measured in that way, returns all: their names say how they were measured.
    """
    metrics = {name: value for name, value in first_stage.items() if name[:1] == "r"}
    return {name: value for name, value in metrics.items() if name[1:] in values} or metrics


def side_by_side(runs: dict[str, dict[str, float]]) -> Table:
    """A table of runs of one protocol: a row per metric that all runs have, a column per run."""
    first = next(iter(runs.values()))
    table = Table("metric", *runs, "real images")
    table.columns[0].overflow = "fold"  # full names, even on a narrow terminal
    for name in measured_of_samples(first):
        if all(name in values for values in runs.values()):
            cells = [with_spread(values, name) for values in runs.values()]
            table.add_row(name, *cells, real_beside(first, name))
    return table


def real_beside(values: dict[str, float], name: str) -> str:
    """The value of real images for a metric, if any, and their number if it is another."""
    metric, _, protocol = name.partition("/")
    real = [other for other in values if other.partition("/")[0] == metric + REAL]
    if not real:
        return ""
    measured = real[-1].partition("/")[2]
    other = "" if measured == protocol else f" at {measured.rpartition('-')[2]} images"
    return f"{values[real[-1]]:.4g}{other}"


def measured_of_samples(values: dict[str, float]) -> list[str]:
    """The names of the metrics of generated images, without standard deviations."""
    return [name for name in values if not name.partition("/")[0].endswith(BESIDE)]


def with_spread(values: dict[str, float], name: str) -> str:
    """A value in four digits, with its standard deviation where that is known."""
    std = values.get(name.replace("/", "_std/", 1))
    return f"{values[name]:.4g}" + (f" ± {std:.2g}" if std is not None else "")
