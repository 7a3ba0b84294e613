"""Scaling laws of the series of a comparison: their points, fits and held-out sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from diffusion_lab.analysis.comparison import curves
from diffusion_lab.analysis.comparison.power_laws import (
    PowerLaw,
    bootstrap,
    fit,
    identifiable,
    interval,
    misfit,
    points_needed,
    varies,
)
from diffusion_lab.analysis.comparison.size_series import Member, SizeSeries, distinct
from diffusion_lab.metrics import Quantity

COMPUTE, SIZE_AND_IMAGES = "E + A C^-b", "E + A N^-a + B D^-b"
VARIED = 3  # the fewest sizes, and numbers of images, for a law of both
TOLERATED = 0.1  # relative error up to which a law predicts a held-out size
NUMBERS = (
    "offset",
    "compute_factor",
    "compute_exponent",
    "size_factor",
    "size_exponent",
    "images_factor",
    "images_exponent",
    "optimal_size_exponent",
)


class NoLaw(Exception):
    """The values of a series follow no law, or are too few; the message is the reason."""


@dataclass(frozen=True)
class HeldOut:
    """A prediction of the largest size by the law of the others.

    `error` is the largest relative error over its `points`; None if there is none, for `reason`.
    `unchanged` is the error of a guess that knows no law, the next smaller size's value after as
    many images; None if it has none.
    """

    size: str
    error: float | None
    reason: str = ""
    points: int = 0
    unchanged: float | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None and self.error > TOLERATED


@dataclass(frozen=True)
class ScalingLaw:
    """The law of a metric of a series: its fit to `points`, and fits of draws of their seeds.

    `unit` is the number of FLOPs of a MAC of an image, C / (N D).
    """

    series: SizeSeries
    form: str
    points: tuple[Member, ...]
    unit: float
    fitted: PowerLaw
    draws: tuple[PowerLaw, ...]
    error: float  # the largest relative error over the points
    held_out: HeldOut

    def front(self, law: PowerLaw) -> PowerLaw:
        """The law of compute C in FLOPs that `law` means along the compute-optimal front."""
        return law.along_front(self.unit) if self.form == SIZE_AND_IMAGES else law

    @property
    def at_the_border(self) -> int:
        """How many points have the least or the most of the series, of sizes or of images.

        Beyond these nothing was trained, so that a front of them need not be compute-optimal.
        """
        sizes = [each.macs for each in self.series.members]
        lengths = [each.images for each in self.series.members]
        return sum(_ends(p.macs, sizes) or _ends(p.images, lengths) for p in self.points)

    @cached_property
    def numbers(self) -> dict[str, tuple[float, float, float] | tuple[float, None, None]]:
        """The value and the bounds of its interval, of each of `NUMBERS` that the law has.

        Bounds are None without several seeds. Sizes are in MACs, compute in FLOPs.
        """
        drawn = [self._numbers(law) for law in self.draws]
        return {
            name: (value, *(interval([each[name] for each in drawn]) if drawn else (None, None)))
            for name, value in self._numbers(self.fitted).items()
        }

    def _numbers(self, law: PowerLaw) -> dict[str, float]:
        front = self.front(law)
        values = [law.offset, *front.factors, *front.exponents]
        if self.form == SIZE_AND_IMAGES:
            pairs = zip(law.factors, law.exponents, strict=True)
            values += [*(number for pair in pairs for number in pair), law.optimal_size_exponent]
        return dict(zip(NUMBERS, values, strict=False))

    @property
    def flops(self) -> NDArray:
        """Up to 60 FLOPs at which the front is known, in a row: there are points on both sides.

        A front of size and images is known where its optimum is within both; maybe nowhere.
        """
        spent = [point.flops for point in self.points]
        found = np.geomspace(min(spent), max(spent), 60)
        if self.form == COMPUTE:
            return found
        x = variables(self.points, self.form)
        optimum = self.fitted.optimum(found / self.unit)  # (2, 60)
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        return found[((low <= optimum) & (optimum <= high)).all(axis=0)]

    def band(self, flops: NDArray) -> tuple[NDArray, NDArray] | None:
        """The bounds of the 95 % interval of the law at each of `flops`; None without an interval.

        They are of each place alone, not of the whole curve.
        """
        if not self.draws:
            return None
        drawn = np.stack([self.front(law)(flops) for law in self.draws], axis=1)
        low, high = zip(*map(interval, drawn), strict=True)
        return np.array(low), np.array(high)


def law_of(series: SizeSeries, metric: Quantity, form: str) -> ScalingLaw:
    """Fits a law of one form to a series; raises NoLaw with the reason if there is none."""
    members = measured(series.members, metric)
    points = _points(members, metric, form)
    fitted = _fitted(points, metric, form)
    x, seeds = variables(points, form), [point.group.values(metric.name) for point in points]
    first = points[0]
    return ScalingLaw(
        series,
        form,
        tuple(points),
        first.flops / (first.macs * first.images),
        fitted,
        tuple(bootstrap(fitted, x, seeds)),
        float(misfit(fitted, x, _means(points, metric)).max()),
        _held_out(members, metric, form),
    )


def _held_out(members: Sequence[Member], metric: Quantity, form: str) -> HeldOut:
    """Predicts the largest size by the others; the law of compute, its points on the front."""
    size = members[-1].size
    own = [point for point in _points(members, metric, form) if point.size == size]
    if not own:
        return HeldOut(size, None, "it is nowhere on the compute-optimal front")
    try:
        others = _points([each for each in members if each.size != size], metric, form)
        law = _fitted(others, metric, form)
    except NoLaw as reason:
        return HeldOut(size, None, str(reason))
    means = _means(own, metric)
    errors = misfit(law, variables(own, form), means)
    smaller = [each for each in members if each.size != size]
    below = [each for each in smaller if each.size == smaller[-1].size]
    guesses = [_after(each.images, below, metric) for each in own]
    known = [abs(g / m - 1) for g, m in zip(guesses, means, strict=True) if g is not None]
    return HeldOut(size, float(errors.max()), "", len(own), max(known, default=None))


def _ends(amount: float, amounts: Sequence[float]) -> bool:
    """Whether an amount is the smallest or the largest of some, to 5 %."""
    return any(distinct([end, amount]) == 1 for end in (min(amounts), max(amounts)))


def _after(images: float, members: Sequence[Member], metric: Quantity) -> float | None:
    """The value of the member that was trained on as many images; None if none was."""
    found = [each for each in members if distinct([each.images, images]) == 1]
    return found[0].group.mean(metric.name) if found else None


def measured(members: Sequence[Member], metric: Quantity) -> list[Member]:
    """The members with a value of the metric."""
    return [member for member in members if member.group.values(metric.name)]


def on_front(members: Sequence[Member], metric: Quantity) -> list[Member]:
    """The members that no cheaper one equals: the compute-optimal front, by FLOPs."""
    points = [(member.flops, member.group.mean(metric.name)) for member in members]
    return [members[place] for place in curves.front(points, metric.higher_is_better)]


def variables(members: Sequence[Member], form: str) -> NDArray:
    """The variables of a form at P members: (1, P) FLOPs, or (2, P) MACs and images."""
    if form == COMPUTE:
        return np.array([[member.flops for member in members]])
    return np.array([[member.macs, member.images] for member in members]).T


def _points(members: Sequence[Member], metric: Quantity, form: str) -> list[Member]:
    return on_front(members, metric) if form == COMPUTE else list(members)


def _means(members: Sequence[Member], metric: Quantity) -> list[float]:
    return [member.group.mean(metric.name) for member in members]


def _fitted(points: Sequence[Member], metric: Quantity, form: str) -> PowerLaw:
    """Fits a law to points; raises NoLaw with the reason if there are too few or it is none."""
    x, means = variables(points, form), _means(points, metric)
    terms = len(x) if points else 1
    where = "on the front" if form == COMPUTE else "in all"
    if len(points) < (needed := points_needed(terms)):
        raise NoLaw(f"{len(points)} points {where}, and {1 + 2 * terms} parameters need {needed}")
    if form == SIZE_AND_IMAGES and min(map(distinct, x)) < VARIED:
        raise NoLaw(f"it needs {VARIED} sizes and {VARIED} numbers of images")
    if min(means) <= 0 or not varies(means):
        raise NoLaw("values are equal, or not all positive")
    if not identifiable(x):
        raise NoLaw("sizes and numbers of images rise together")
    law = fit(x, means)
    if not law.found_in(x):
        raise NoLaw("values do not fall by such a law")
    return law
