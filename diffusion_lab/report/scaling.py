"""Scaling laws: series of sizes of one network, laws fitted to them, and their held-out sizes."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import CLASS, Settings
from diffusion_lab.metrics.quantity import QUANTITIES, VALIDATION_LOSS, Quantity
from diffusion_lab.report.arms import ALL, Arm, names_of, varying
from diffusion_lab.report.facts import EQUAL_COST
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.power_laws import (
    PowerLaw,
    bootstrap,
    fit,
    identifiable,
    interval,
    misfit,
    points_needed,
    varies,
)
from diffusion_lab.report.words import Fact

NETWORK = "backbone."
LENGTH = ("trainer.max_steps", "trainer.max_time")  # a budget of images sets the steps
FOLLOWS = {"optimizer.vector_lr": "optimizer.lr"}  # a key that takes the value of another
COSTS, POINTS, SIZES = 3, 4, 2  # the fewest of a series: amounts of FLOPs, members, sizes
COMPUTE, SIZE_AND_IMAGES = "E + A C^-b", "E + A N^-a + B D^-b"
VARIED = 3  # the fewest sizes, and numbers of images, for a law of both
TOLERATED = 0.1  # relative error up to which a law predicts a held-out size
NUMBERS = (
    *("offset", "compute_factor", "compute_exponent", "size_factor", "size_exponent"),
    *("images_factor", "images_exponent", "optimal_size_exponent"),
)
SCALED = (QUANTITIES[0], VALIDATION_LOSS)  # FID and the loss that training minimises
COLUMNS = [
    *("metric", "family", "law", "points", "seeds"),
    *(f"{name}{end}" for name in NUMBERS for end in ("", "_low", "_high")),
    *("fit_error", "at_the_border", "extrapolated", "held_out", "held_out_error"),
    *("held_out_points", "held_out_unchanged", "reason"),
]
TEXTS = ("metric", "family", "law", "held_out", "reason")  # the columns that are no numbers


class NoLaw(Exception):
    """The values of a series follow no law, or are too few; the message is the reason."""


@dataclass(frozen=True)
class Member:
    """An arm of a series: its size in words, MACs per image, images seen, FLOPs, and values."""

    arm: Arm
    size: str
    macs: float
    images: float
    flops: float
    values: Mapping[str, list[float]]  # of each run, by metric

    def mean(self, metric: Quantity) -> float:
        return statistics.mean(self.values[metric.name])


@dataclass(frozen=True)
class SizeSeries:
    """A network in several sizes and budgets; `members` are sorted by MACs, then by images."""

    name: str
    colour: int
    members: tuple[Member, ...]

    @cached_property
    def sizes(self) -> list[str]:
        """The names of the sizes, from the smallest to the largest."""
        return list(dict.fromkeys(member.size for member in self.members))

    def measured(self, metric: Quantity) -> list[Member]:
        """The members with a value of the metric."""
        return [member for member in self.members if member.values.get(metric.name)]


@dataclass(frozen=True)
class ScalingLaw:
    """The law of a metric of a series: its fit to `points`, and fits of draws of their seeds.

    `unit` is the number of FLOPs of a MAC of an image, C / (N D).
    """

    form: str
    points: tuple[Member, ...]
    unit: float
    fitted: PowerLaw
    draws: tuple[PowerLaw, ...]

    def front(self, law: PowerLaw) -> PowerLaw:
        """The law of compute C in FLOPs that `law` means along the compute-optimal front."""
        return law.along_front(self.unit) if self.form == SIZE_AND_IMAGES else law

    def numbers(self, law: PowerLaw) -> dict[str, float]:
        """The values of NUMBERS that the law has; sizes are in MACs, compute in FLOPs."""
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

    def band(self, flops: NDArray) -> list[tuple[float, float]]:
        """The 95 % interval of the law at each of `flops`, empty without several seeds."""
        drawn = [self.front(law)(flops) for law in self.draws]
        return [interval(values) for values in np.transpose(drawn)]


@dataclass(frozen=True)
class ScaledMetric:
    """The laws of all series by one metric: a row of `table` for each fit, and those to draw."""

    metric: Quantity
    series: tuple[SizeSeries, ...]
    table: pd.DataFrame
    laws: dict[str, ScalingLaw]  # by series: the last form whose front is known, which says more

    @property
    def facts(self) -> list[Fact]:
        """Facts on all fits; the first one warns of laws that do not predict."""
        title, known = self.metric.title, self.table
        failed = known[known.held_out_error > TOLERATED].groupby("family").held_out_error.max()
        warning = [Fact("law_fails", title=title, errors=dict(failed))] if len(failed) else []
        rows = known.to_dict("records")
        return warning + [fact for row in rows for fact in _facts(row, self.metric)]


def _facts(row: dict, metric: Quantity) -> Iterator[Fact]:
    """Yields facts on one fit, or on the reason why there is none."""
    of = {"series": row["family"], "form": row["law"], "title": metric.title}
    if np.isnan(row["points"]):
        yield Fact("no_law", **of, reason=row["reason"])
        return
    exponent, low, high = (row[f"compute_exponent{end}"] for end in ("", "_low", "_high"))
    one_seed = np.isnan(low)
    ends, offset = None if one_seed else (low, high), metric.number(row["offset"])
    yield Fact("law", **of, offset=offset, exponent=exponent, ends=ends)
    if one_seed:
        yield Fact("law_of_one_seed", **of)
    if row["extrapolated"] == 1:
        yield Fact("law_extrapolated", **of)
    if 2 * row["at_the_border"] > row["points"]:
        yield Fact("law_at_border", **of, at=row["at_the_border"], points=row["points"])
    held = {"size": row["held_out"], "error": row["held_out_error"]}
    if np.isnan(held["error"]):
        yield Fact("not_held_out", **of, size=row["held_out"], reason=row["reason"])
        return
    yield Fact("held_out", **of, **held, points=row["held_out_points"])
    if not np.isnan(row["held_out_unchanged"]):
        yield Fact("unchanged", **of, error=row["held_out_unchanged"])


def scaling(found: Collection) -> list[ScaledMetric]:
    """Fits scaling laws to the series of sizes among the arms; none without a series."""
    series, scaled = size_series(found), []
    for metric in SCALED:
        known = [each for each in series if each.measured(metric)]
        rows: list[dict] = []
        laws: dict[str, ScalingLaw] = {}
        for each in known:
            members = each.measured(metric)
            amounts = ([member.macs for member in members], [member.images for member in members])
            both = min(map(distinct, amounts)) >= VARIED
            for form in (COMPUTE, SIZE_AND_IMAGES)[: 1 + both]:
                start = {"metric": metric.name, "family": each.name, "law": form}
                try:
                    law, row = law_of(each, metric, form)
                    laws |= {each.name: law} if len(law.flops) else {}
                except NoLaw as reason:
                    row = {"reason": str(reason)}
                rows.append(start | row)
        if known:
            table = pd.DataFrame(rows, columns=COLUMNS)
            numbers = [name for name in COLUMNS if name not in TEXTS]
            table[numbers] = table[numbers].astype(float)
            scaled.append(ScaledMetric(metric, tuple(known), table, laws))
    return scaled


def scaling_csv(scaled: Iterable[ScaledMetric]) -> str:
    """A row for each fit, without rounding, in MACs, images and FLOPs."""
    return pd.concat([each.table for each in scaled]).to_csv(index=False)


def size_series(found: Collection) -> list[SizeSeries]:
    """Finds arms that differ in numbers below `backbone.`, tuned values and length alone.

    Texts, switches and classes below `backbone.` are no sizes. A series has at least 3 amounts of
    training FLOPs, 4 members, 2 sizes and 2 numbers of images.
    """
    alike: dict[str, list[Arm]] = {}
    for arm in found.arms:
        if arm.fact("macs"):
            alike.setdefault(json.dumps(_fixed(arm), sort_keys=True), []).append(arm)
    ends = found.ends()
    values: dict[str, dict[str, list[float]]] = {}
    for metric in SCALED:
        own = ends[ends.metric == metric.name].groupby(["arm", "seed"]).value.mean()
        for (arm, _), value in own.items():
            values.setdefault(arm, {}).setdefault(metric.name, []).append(value)
    series = [members for own in alike.values() if (members := _members(own, values))]
    fixed = [_fixed(members[0].arm) for members in series]
    names = [
        str(members[0].arm.runs[0].settings[NETWORK + CLASS]).rpartition(".")[2]
        if name == ALL
        else name
        for name, members in zip(names_of(fixed, varying(fixed)), series, strict=True)
    ]
    named = zip(names, series, strict=True)
    return [SizeSeries(name, place, members) for place, (name, members) in enumerate(named)]


def _members(arms: Sequence[Arm], values: Mapping[str, Mapping]) -> tuple[Member, ...]:
    """The members of a series; none if the arms are no series."""
    if len(arms) < POINTS:
        return ()
    found = []
    for arm, size in zip(arms, _sizes(arms), strict=True):
        images, macs = arm.fact("images_seen") or 0.0, arm.fact("macs") or 0.0
        if (flops := arm.runs[0].summary.flops(images)) is None:
            return ()
        found.append(Member(arm, size, macs, images, flops, values.get(arm.name, {})))
    counts = (
        distinct(member.flops for member in found) >= COSTS,
        distinct(member.macs for member in found) >= SIZES,
        distinct(member.images for member in found) >= SIZES,
    )
    found.sort(key=lambda member: (member.macs, member.size, member.images))
    return tuple(found) if all(counts) else ()


def distinct(amounts: Iterable[float]) -> int:
    """The number of amounts that differ by more than 5 % from the next smaller one."""
    count, last = 0, 0.0
    for amount in sorted(amounts):
        if amount > (1 + EQUAL_COST) * last:
            count, last = count + 1, amount
    return count


def _sizes(arms: Sequence[Arm]) -> list[str]:
    """The name of each arm's size: width=64."""
    sizes: list[Settings] = [
        {key: value for key, value in arm.settings.items() if _is_size(key, value)} for arm in arms
    ]
    unique = list({json.dumps(size, sort_keys=True): size for size in sizes}.values())
    names = names_of(unique, varying(unique))
    return [names[unique.index(size)] for size in sizes]


def _fixed(arm: Arm) -> Settings:
    """The settings that members of a series have in common, if they differ between any arms.

    Settings that were tuned for each size may differ.
    """
    tuned = OmegaConf.select(arm.runs[0].config, "tuning.values") or {}
    return {
        key: value
        for key, value in arm.settings.items()
        if key not in LENGTH and FOLLOWS.get(key, key) not in tuned and not _is_size(key, value)
    }


def _is_size(key: str, value: object) -> bool:
    """Whether a setting is a number, or a list of numbers, of the network."""
    values = value if isinstance(value, list) else [value]
    numbers = (isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    return key.startswith(NETWORK) and all(numbers)


def law_of(series: SizeSeries, metric: Quantity, form: str) -> tuple[ScalingLaw, dict]:
    """Fits a law of one form to a series, and a row on it; raises NoLaw if there is none."""
    members = series.measured(metric)
    points = _points(members, metric, form)
    fitted = _fitted(points, metric, form)
    x, seeds = variables(points, form), [point.values[metric.name] for point in points]
    unit = points[0].flops / (points[0].macs * points[0].images)
    law = ScalingLaw(form, tuple(points), unit, fitted, tuple(bootstrap(fitted, x, seeds)))
    row: dict = {"points": len(points), "seeds": min(map(len, seeds))}
    row["fit_error"] = float(misfit(fitted, x, _means(points, metric)).max())
    drawn = [law.numbers(each) for each in law.draws]
    for name, value in law.numbers(fitted).items():
        ends = interval([each[name] for each in drawn]) if drawn else (None, None)
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), (value, *ends), strict=True))
    if form == COMPUTE:
        # beyond these nothing was trained, so that a front of them need not be compute-optimal
        sizes, lengths = [m.macs for m in series.members], [m.images for m in series.members]
        row["at_the_border"] = sum(_ends(p.macs, sizes) or _ends(p.images, lengths) for p in points)
    row["extrapolated"] = form == SIZE_AND_IMAGES and not len(law.flops)
    return law, row | _held_out(members, metric, form)


def _held_out(members: Sequence[Member], metric: Quantity, form: str) -> dict:
    """How far the law of the other sizes is off at the largest one, at most; or the reason.

    Beside it stands a guess that knows no law, the next smaller size's value after as many images.
    """
    found: dict = {"held_out": members[-1].size}
    smaller = [each for each in members if each.size != members[-1].size]
    own = [each for each in _points(members, metric, form) if each.size == members[-1].size]
    if not own:
        return found | {"reason": "it is nowhere on the compute-optimal front"}
    try:
        law = _fitted(_points(smaller, metric, form), metric, form)
    except NoLaw as reason:
        return found | {"reason": str(reason)}
    values = _means(own, metric)
    errors = misfit(law, variables(own, form), values)
    below = [each for each in smaller if each.size == smaller[-1].size]
    guesses = [
        abs(other.mean(metric) / value - 1)
        for point, value in zip(own, values, strict=True)
        for other in below
        if distinct([other.images, point.images]) == 1
    ]
    found |= {"held_out_error": float(errors.max()), "held_out_points": len(own)}
    return found | {"held_out_unchanged": max(guesses, default=None)}


def _ends(amount: float, amounts: Sequence[float]) -> bool:
    """Whether an amount is the smallest or the largest of some, to 5 %."""
    return any(distinct([end, amount]) == 1 for end in (min(amounts), max(amounts)))


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """The Pareto front of points (cost, value): their indices, sorted by cost."""
    sign = -1 if higher_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    best: list[int] = []
    for place in order:
        if not best or sign * points[place][1] < sign * points[best[-1]][1]:
            best.append(place)
    return best


def on_front(members: Sequence[Member], metric: Quantity) -> list[Member]:
    """The members that no cheaper one equals: the compute-optimal front, by FLOPs."""
    points = [(member.flops, member.mean(metric)) for member in members]
    return [members[place] for place in front(points, metric.higher_is_better)]


def variables(members: Sequence[Member], form: str) -> NDArray:
    """The variables of a form at P members: (1, P) FLOPs, or (2, P) MACs and images."""
    if form == COMPUTE:
        return np.array([[member.flops for member in members]])
    return np.array([[member.macs, member.images] for member in members]).T


def _points(members: Sequence[Member], metric: Quantity, form: str) -> list[Member]:
    return on_front(members, metric) if form == COMPUTE else list(members)


def _means(members: Sequence[Member], metric: Quantity) -> list[float]:
    return [member.mean(metric) for member in members]


def _fitted(points: Sequence[Member], metric: Quantity, form: str) -> PowerLaw:
    """Fits a law to points; raises NoLaw with the reason if there are too few or it is none."""
    x, values = variables(points, form), _means(points, metric)
    terms = len(x) if points else 1
    where = "on the front" if form == COMPUTE else "in all"
    if len(points) < (needed := points_needed(terms)):
        raise NoLaw(f"{len(points)} points {where}, and {1 + 2 * terms} parameters need {needed}")
    if form == SIZE_AND_IMAGES and min(map(distinct, x)) < VARIED:
        raise NoLaw(f"it needs {VARIED} sizes and {VARIED} numbers of images")
    if min(values) <= 0 or not varies(values):
        raise NoLaw("values are equal, or not all positive")
    if not identifiable(x):
        raise NoLaw("sizes and numbers of images rise together")
    law = fit(x, values)
    if not law.found_in(x):
        raise NoLaw("values do not fall by such a law")
    return law
