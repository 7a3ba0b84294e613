"""Scaling laws: series of sizes of one network, laws fitted to them, and their held-out sizes."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import Settings
from diffusion_lab.metrics.quantity import QUANTITIES, VALIDATION_LOSS, Quantity
from diffusion_lab.report.arms import ALL, Arm, names_of, varying
from diffusion_lab.report.facts import EQUAL_COST
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.power_laws import DRAWS, NoLaw, PowerLaw, bootstrap, fit, interval, misfit
from diffusion_lab.report.words import Fact

NETWORK = "backbone."
LENGTH = ("trainer.max_steps", "trainer.max_time")  # a budget of images sets the steps
FOLLOWS = {"optimizer.vector_lr": "optimizer.lr"}  # a key that takes the value of another
COSTS, POINTS, SIZES = 3, 4, 2  # the fewest of a series: amounts of FLOPs, points, sizes
COMPUTE, SIZE_AND_IMAGES = "E + A C^-b", "E + A N^-a + B D^-b"
VARIED = 3  # the fewest sizes, and numbers of images, for a law of both
TOLERATED = 0.1  # relative error up to which a law predicts a held-out size
NUMBERS = (
    *("offset", "compute_factor", "compute_exponent", "size_factor", "size_exponent"),
    *("images_factor", "images_exponent", "optimal_size_exponent"),
)
SCALED = (QUANTITIES[0], VALIDATION_LOSS)  # FID and the loss that training minimises
TEXTS = ("metric", "family", "law", "held_out", "reason")  # the columns that are no numbers
COLUMNS = [
    *("metric", "family", "law", "points", "seeds"),
    *(f"{name}{end}" for name in NUMBERS for end in ("", "_low", "_high")),
    *("fit_error", "at_the_border", "extrapolated", "held_out", "held_out_error"),
    *("held_out_points", "held_out_unchanged", "reason"),
]


@dataclass(frozen=True)
class Point:
    """An arm of a series: its size in words, MACs per image, images seen, FLOPs, and values."""

    size: str
    macs: float
    images: float
    flops: float
    values: list[float]  # of each run, by one metric

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)


@dataclass(frozen=True)
class SizeSeries:
    """A network in several sizes and budgets; `points` are sorted by MACs, then by images."""

    name: str
    colour: int
    points: list[Point]

    @property
    def sizes(self) -> list[str]:
        """The names of the sizes, from the smallest to the largest."""
        return list(dict.fromkeys(point.size for point in self.points))


@dataclass(frozen=True)
class ScalingLaw:
    """The law of a metric of a series: its fit to `points`, and fits of draws of their seeds."""

    form: str
    points: list[Point]
    fitted: PowerLaw
    draws: list[PowerLaw]

    @property
    def unit(self) -> float:
        """The number of FLOPs of a MAC of an image, C / (N D)."""
        return self.points[0].flops / (self.points[0].macs * self.points[0].images)

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
    series: list[SizeSeries]
    table: pd.DataFrame
    laws: dict[str, ScalingLaw]  # by series: the last form whose front is known, which says more

    @property
    def facts(self) -> Iterator[Fact]:
        """Yields facts on each fit, or on the reason why there is none."""
        for row in self.table.to_dict("records"):
            of = {"series": row["family"], "form": row["law"]}
            if np.isnan(row["points"]):
                yield Fact("no_law", **of, title=self.metric.title, reason=row["reason"])
                continue
            exponent, low, high = (row[f"compute_exponent{end}"] for end in ("", "_low", "_high"))
            ends = None if np.isnan(low) else (low, high)
            above = {"title": self.metric.title, "offset": self.metric.number(row["offset"])}
            yield Fact("law", **of, **above, exponent=exponent, ends=ends)
            if row["extrapolated"] == 1:
                yield Fact("law_extrapolated", **of)
            if 2 * row["at_the_border"] > row["points"]:
                yield Fact("law_at_border", **of, at=row["at_the_border"], points=row["points"])
            size, error = row["held_out"], row["held_out_error"]
            if np.isnan(error):
                yield Fact("not_held_out", **of, size=size, reason=row["reason"])
                continue
            yield Fact("held_out", **of, size=size, error=error, points=row["held_out_points"])
            if error > TOLERATED:
                yield Fact("law_fails", **of, size=size)
            if not np.isnan(row["held_out_unchanged"]):
                yield Fact("unchanged", **of, error=row["held_out_unchanged"])


def scaling(found: Collection) -> list[ScaledMetric]:
    """Fits scaling laws to the series of sizes among the arms; none without a series."""
    scaled = []
    for metric in SCALED:
        series = size_series(found, metric)
        rows: list[dict] = []
        laws: dict[str, ScalingLaw] = {}
        for each in series:
            amounts = zip(*((point.macs, point.images) for point in each.points), strict=True)
            both = min(map(distinct, amounts)) >= VARIED
            for form in (COMPUTE, SIZE_AND_IMAGES)[: 1 + both]:
                row = {"metric": metric.name, "family": each.name, "law": form}
                try:
                    law = law_of(each.points, form)
                    row |= row_on(law, each.points)
                    laws |= {each.name: law} if len(law.flops) else {}
                except NoLaw as reason:
                    row["reason"] = str(reason)
                rows.append(row)
        if series:
            table = pd.DataFrame(rows, columns=COLUMNS)
            numbers = [name for name in COLUMNS if name not in TEXTS]
            table[numbers] = table[numbers].astype(float)
            scaled.append(ScaledMetric(metric, series, table, laws))
    return scaled


def scaling_csv(scaled: Iterable[ScaledMetric]) -> str:
    """A row for each fit, without rounding, in MACs, images and FLOPs."""
    return pd.concat([each.table for each in scaled]).to_csv(index=False)


def size_series(found: Collection, metric: Quantity) -> list[SizeSeries]:
    """Finds arms that differ in numbers below `backbone.`, tuned values and length alone.

    Texts, switches and classes below `backbone.` are no sizes. A series has at least 3 amounts of
    training FLOPs, 4 arms, 2 sizes and 2 numbers of images, and a value of the metric.
    """
    alike: dict[str, list[Arm]] = {}
    for arm in found.arms:
        if arm.fact("macs") and arm.runs[0].summary.flops(1):
            alike.setdefault(json.dumps(_fixed(arm), sort_keys=True), []).append(arm)
    known = found.values(metric.name).groupby("arm").value
    values = {arm: [*own] for arm, own in known}
    series = {}
    for fixed, arms in alike.items():
        sizes: list[Settings] = [
            {key: each for key, each in arm.settings.items() if _is_size(key, each)} for arm in arms
        ]
        unique = list({json.dumps(size, sort_keys=True): size for size in sizes}.values())
        names = names_of(unique, varying(unique))
        points = []
        for arm, size in zip(arms, sizes, strict=True):
            images, macs = arm.fact("images_seen") or 0.0, arm.fact("macs") or 0.0
            cost = (macs, images, arm.runs[0].summary.flops(images) or 0.0)
            points.append(Point(names[unique.index(size)], *cost, values.get(arm.name, [])))
        fewest = {"flops": COSTS, "macs": SIZES, "images": SIZES}
        enough = (distinct(getattr(p, key) for p in points) >= n for key, n in fewest.items())
        if len(points) >= POINTS and all(enough) and any(point.values for point in points):
            points.sort(key=lambda point: (point.macs, point.size, point.images))
            series[fixed] = arms[0], [point for point in points if point.values]
    fixed_settings = [json.loads(fixed) for fixed in series]
    found_names = names_of(fixed_settings, varying(fixed_settings))
    return [
        SizeSeries(arm.runs[0].network if name == ALL else name, place, points)
        for place, (name, (arm, points)) in enumerate(
            zip(found_names, series.values(), strict=True)
        )
    ]


def distinct(amounts: Iterable[float]) -> int:
    """The number of amounts that differ by more than 5 % from the next smaller one."""
    count, last = 0, 0.0
    for amount in sorted(amounts):
        if amount > (1 + EQUAL_COST) * last:
            count, last = count + 1, amount
    return count


def _fixed(arm: Arm) -> Settings:
    """The settings that arms of a series have in common, but for what was tuned by size."""
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


def law_of(known: Sequence[Point], form: str, draws: int = DRAWS) -> ScalingLaw:
    """Fits a law of one form to points, that of compute to their front; may raise NoLaw."""
    points = on_front(known) if form == COMPUTE else list(known)
    if form == SIZE_AND_IMAGES and min(map(distinct, variables(points, form))) < VARIED:
        raise NoLaw(f"it needs {VARIED} sizes and {VARIED} numbers of images")
    x, seeds = variables(points, form), [point.values for point in points]
    fitted = fit(x, [point.mean for point in points])
    return ScalingLaw(form, points, fitted, bootstrap(fitted, x, seeds, draws))


def row_on(law: ScalingLaw, known: Sequence[Point]) -> dict:
    """The numbers of a law of some of the known points with their intervals, and of its fit."""
    x, points = variables(law.points, law.form), law.points
    row: dict = {"points": len(points), "seeds": min(len(point.values) for point in points)}
    row["fit_error"] = float(misfit(law.fitted, x, [point.mean for point in points]).max())
    drawn = [law.numbers(each) for each in law.draws]
    for name, value in law.numbers(law.fitted).items():
        low, high = interval([each[name] for each in drawn]) if drawn else (None, None)
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    if law.form == COMPUTE:
        # beyond these nothing was trained, so that a front of them need not be compute-optimal
        sizes, lengths = [point.macs for point in known], [point.images for point in known]
        row["at_the_border"] = sum(_ends(p.macs, sizes) or _ends(p.images, lengths) for p in points)
    row["extrapolated"] = law.form == SIZE_AND_IMAGES and not len(law.flops)
    return row | _held_out(law, known)


def _held_out(law: ScalingLaw, known: Sequence[Point]) -> dict:
    """How far the law of the other sizes is off at the largest one, at most; or the reason.

    Beside it stands a guess that knows no law, the next smaller size's value after as many images.
    """
    found: dict = {"held_out": known[-1].size}
    smaller = [point for point in known if point.size != known[-1].size]
    own = [point for point in law.points if point.size == known[-1].size]
    if not own:
        return found | {"reason": "it is nowhere on the compute-optimal front"}
    try:
        other = law_of(smaller, law.form, draws=0).fitted
    except NoLaw as reason:
        return found | {"reason": str(reason)}
    errors = misfit(other, variables(own, law.form), [point.mean for point in own])
    guesses = [
        abs(guess.mean / point.mean - 1)
        for point in own
        for guess in smaller
        if guess.size == smaller[-1].size and distinct([guess.images, point.images]) == 1
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


def on_front(points: Sequence[Point]) -> list[Point]:
    """The points that no cheaper one equals: the compute-optimal front, by FLOPs."""
    return [points[place] for place in front([(p.flops, p.mean) for p in points], False)]


def variables(points: Sequence[Point], form: str) -> NDArray:
    """The variables of a form at P points: (1, P) FLOPs, or (2, P) MACs and images."""
    if form == COMPUTE:
        return np.array([[point.flops for point in points]])
    return np.array([[point.macs, point.images] for point in points]).reshape(-1, 2).T
