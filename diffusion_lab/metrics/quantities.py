"""All metrics, in the order in which they are measured and reported, and their values as text."""

from collections.abc import Sequence

from rich.table import Table

from diffusion_lab.metrics.classifier_scores import Accuracy, InceptionScore
from diffusion_lab.metrics.coverage import DensityCoverage, PrecisionRecall
from diffusion_lab.metrics.feature_distances import (
    FID,
    KID,
    MIND,
    MMD,
    ClassFID,
    ClassifierFID,
    SpatialFID,
)
from diffusion_lab.metrics.likelihood_divergence import FLD
from diffusion_lab.metrics.metric import Metric
from diffusion_lab.metrics.quantity import REAL, Quantity, quantity_of
from diffusion_lab.metrics.real_or_drawn import RealOrDrawn
from diffusion_lab.metrics.seams import Seams

# all metrics of the package, in the order in which they are measured and reported
BUILT_IN: tuple[type[Metric], ...] = (
    FID,
    KID,
    MMD,
    MIND,
    FLD,
    PrecisionRecall,
    DensityCoverage,
    SpatialFID,
    Seams,
    RealOrDrawn,
    InceptionScore,
    ClassifierFID,
    Accuracy,
    ClassFID,
)


def report(
    values: dict[str, float], class_names: Sequence[str] = (), extra: Sequence[Quantity] = ()
) -> list[str]:
    """Returns the lines of a table: metrics, their values, those of real images, and full names.

    `extra` holds quantities of metrics from outside the package. Without metrics there is no line.
    """
    real, rows = real_values(values), [("metric", "value", "real images", "name")]
    for name in measured_of_samples(values):
        metric, _, protocol = name.partition("/")
        beside = real_beside(real[metric], protocol) if metric in real else ""
        rows.append((title_of(metric, class_names, extra), with_spread(values, name), beside, name))
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
    real = real_values(first)
    table = Table("metric", *runs, "real images")
    table.columns[0].overflow = "fold"  # full names, even on a narrow terminal
    for name in measured_of_samples(first):
        if all(name in values for values in runs.values()):
            metric, _, protocol = name.partition("/")
            cells = [with_spread(values, name) for values in runs.values()]
            beside = real_beside(real[metric], protocol) if metric in real else ""
            table.add_row(name, *cells, beside)
    return table


def real_beside(real: tuple[float, str], protocol: str) -> str:
    """The value of real images, and the number of images if they are fewer than the samples."""
    value, measured = real
    other = "" if measured == protocol else f" at {measured.rpartition('-')[2]} images"
    return f"{value:.4g}{other}"


def real_values(values: dict[str, float]) -> dict[str, tuple[float, str]]:
    """The value of real images and its protocol, by metric."""
    found = {}
    for name, value in values.items():
        metric, _, protocol = name.partition("/")
        if metric.endswith(REAL):
            found[metric.removesuffix(REAL)] = (value, protocol)
    return found


def measured_of_samples(values: dict[str, float]) -> list[str]:
    """The names of the metrics of generated images, without standard deviations."""
    return [name for name in values if not name.partition("/")[0].endswith((REAL, "_std"))]


def with_spread(values: dict[str, float], name: str) -> str:
    """A value in four digits, with its standard deviation where that is known."""
    std = values.get(name.replace("/", "_std/", 1))
    return f"{values[name]:.4g}" + (f" ± {std:.2g}" if std is not None else "")
