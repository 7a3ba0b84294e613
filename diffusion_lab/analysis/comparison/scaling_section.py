"""The section on scaling laws: which laws are fitted, in words, as a table, as CSV and drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.scaling_drawing import draw_laws
from diffusion_lab.analysis.comparison.scaling_laws import (
    COMPUTE,
    NUMBERS,
    SIZE_AND_IMAGES,
    VARIED,
    HeldOut,
    NoLaw,
    ScalingLaw,
    law_of,
    measured,
)
from diffusion_lab.analysis.comparison.size_series import SizeSeries, distinct, size_series
from diffusion_lab.analysis.comparison.svg import Drawing
from diffusion_lab.common.formats import csv_text
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.quantities import QUANTITIES, VALIDATION_LOSS

SCALED = (QUANTITIES[0], VALIDATION_LOSS)  # FID and the loss that training minimises
HEADS = ("E", "Compute", "Size", "Images", "Optimal size")  # E, then exponents
SHOWN_NUMBERS = tuple(name for name in NUMBERS if not name.endswith("factor"))


@dataclass(frozen=True)
class Attempt:
    """A fit of a law to a series, which may have failed: then `law` is None, for `reason`."""

    metric: Quantity
    series: SizeSeries
    form: str
    law: ScalingLaw | None
    reason: str = ""

    @property
    def cells(self) -> list[tuple[str, str]]:
        """The numbers of the law and their intervals, as text, for the columns of `HEADS`."""
        found = self.law.numbers if self.law else {}
        return [_cell(found.get(name)) for name in SHOWN_NUMBERS]

    @property
    def sentences(self) -> list[str]:
        """Sentences on the law, or on the reason why there is none."""
        name, title = f"{self.series.name}, {self.form}", self.metric.title
        if self.law is None:
            return [f"{name}: no law of {title}, because {self.reason}"]
        exponent, low, high = self.law.numbers["compute_exponent"]
        bounds = "" if low is None else f", 95 % interval {low:.2g} to {high:.2g}"
        least = self.metric.number(self.law.fitted.offset)
        said = [f"{name}: {title} above E = {least} falls as C^-{exponent:.2g}{bounds}"]
        if low is None:
            said.append(f"{name}: there is no interval, because some points have a single seed")
        said += [
            f"{name}: {each}"
            for each in [*_of_the_front(self.law), *_of_held_out(self.law.held_out)]
        ]
        return said


@dataclass(frozen=True)
class ScaledMetric:
    """The laws of all series by one metric, and their drawing."""

    metric: Quantity
    attempts: tuple[Attempt, ...]
    drawing: Drawing

    @property
    def laws(self) -> list[Attempt]:
        """The attempts that found a law."""
        return [attempt for attempt in self.attempts if attempt.law]

    @property
    def sentences(self) -> list[str]:
        """Sentences on all attempts; the first one warns of laws that do not predict."""
        said = [sentence for attempt in self.attempts for sentence in attempt.sentences]
        worst: dict[str, float] = {}
        for law in (attempt.law for attempt in self.attempts if attempt.law):
            if law.held_out.failed and law.held_out.error is not None:
                name = law.series.name
                worst[name] = max(law.held_out.error, worst.get(name, 0.0))
        if not worst:
            return said
        named = ", ".join(f"{name} {_percent(error)}" for name, error in worst.items())
        title = self.metric.title
        return [f"The law of {title} does not predict a held-out size: off by {named}", *said]


@dataclass(frozen=True)
class Scaling:
    """The section on scaling; `series` are the ones that any metric was measured for."""

    series: tuple[SizeSeries, ...]
    metrics: tuple[ScaledMetric, ...]
    heads = HEADS

    @property
    def drawings(self) -> list[Drawing]:
        return [each.drawing for each in self.metrics]

    @property
    def sentences(self) -> list[str]:
        """Sentences on the laws of every metric, the warnings of a metric first."""
        return [sentence for each in self.metrics for sentence in each.sentences]

    def csv(self) -> str:
        """A row for each attempt, without rounding, in MACs, images and FLOPs."""
        head = ["metric", "family", "law", "points", "seeds"]
        head += [f"{name}{end}" for name in NUMBERS for end in ("", "_low", "_high")]
        head += ["fit_error", "at_the_border", "held_out", "held_out_error", "held_out_points"]
        head += ["held_out_unchanged", "reason"]
        attempts = [attempt for each in self.metrics for attempt in each.attempts]
        return csv_text(head, map(_row, attempts))


def scaling(groups: Sequence[Group]) -> Scaling | None:
    """Fits scaling laws to the series of sizes among groups; None if there is none."""
    found = size_series(groups)
    metrics = [scaled for metric in SCALED if (scaled := _scaled(found, metric))]
    return Scaling(tuple(found), tuple(metrics)) if metrics else None


def _scaled(found: Sequence[SizeSeries], metric: Quantity) -> ScaledMetric | None:
    known = [series for series in found if measured(series.members, metric)]
    if not known:
        return None
    attempts = tuple(attempt for series in known for attempt in _attempts(series, metric))
    # the later form says more, and replaces the simple one in the drawing, if its front is known
    laws = {each.series.name: each.law for each in attempts if each.law and len(each.law.flops)}
    return ScaledMetric(metric, attempts, draw_laws(known, laws, metric))


def _attempts(series: SizeSeries, metric: Quantity) -> Iterator[Attempt]:
    members = measured(series.members, metric)
    amounts = ([each.macs for each in members], [each.images for each in members])
    both = min(map(distinct, amounts)) >= VARIED
    for form in (COMPUTE, SIZE_AND_IMAGES)[: 1 + both]:
        try:
            yield Attempt(metric, series, form, law_of(series, metric, form))
        except NoLaw as reason:
            yield Attempt(metric, series, form, None, str(reason))


def _of_the_front(law: ScalingLaw) -> Iterator[str]:
    """Yields a sentence on a front that reaches the border of what was trained."""
    at, points = law.at_the_border, len(law.points)
    if law.form == SIZE_AND_IMAGES and not len(law.flops):
        yield "its front lies outside of the trained sizes and images, so C^-b is extrapolated"
    if law.form == COMPUTE and 2 * at > points:
        yield (
            f"{at} of {points} points are of an outermost size or number of images, so others may "
            "be better"
        )


def _of_held_out(held: HeldOut) -> Iterator[str]:
    """Yields sentences on the prediction of the largest size."""
    if held.error is None:
        yield f"{held.size} is not predicted from the others: {held.reason}"
        return
    points = f"{held.points} point{'s' if held.points > 1 else ''}"
    yield f"fitted without {held.size}, off by {_percent(held.error)} there ({points})"
    if held.unchanged is not None:
        yield (
            "the next smaller size's values, after as many images, are off by "
            f"{_percent(held.unchanged)} there"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def _cell(number: tuple[float, float | None, float | None] | None) -> tuple[str, str]:
    if number is None:
        return "", ""
    value, low, high = number
    return f"{value:.3g}", "" if low is None else f"{low:.3g} to {high:.3g}"


def _row(attempt: Attempt) -> list[object]:
    law, metric = attempt.law, attempt.metric.name
    start = [metric, attempt.series.name, attempt.form]
    if law is None:
        return [*start, *[None] * (8 + 3 * len(NUMBERS)), attempt.reason]
    seeds = min(len(point.group.values(metric)) for point in law.points)
    numbers = [number for name in NUMBERS for number in law.numbers.get(name, (None,) * 3)]
    held = law.held_out
    at = law.at_the_border if law.form == COMPUTE else None
    end = [law.error, at, held.size, held.error, held.points, held.unchanged]
    return [*start, len(law.points), seeds, *numbers, *end, held.reason]
