"""Scaling laws: series of sizes of one network, laws fitted to them, and their held-out sizes.

A frame of points has a row for each arm: its size in words, MACs per image, images seen, FLOPs, the
values of its runs by one metric, and their mean.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf

from diffusion_lab.metrics.quantity import QUANTITIES, VALIDATION_LOSS, Quantity
from diffusion_lab.report.arms import ALL, Arm, names_of, varying
from diffusion_lab.report.facts import EQUAL_COST
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.power_laws import DRAWS, NoLaw, PowerLaw, bootstrap, fit, interval, misfit
from diffusion_lab.report.words import Fact

NETWORK = "backbone."
LENGTH = ("trainer.max_steps", "trainer.max_time")  # a budget of images sets the steps
FOLLOWS = {"optimizer.vector_lr": "optimizer.lr"}  # a key that takes the value of another
FEWEST = {"flops": 3, "macs": 2, "images": 2}  # different amounts in a series
POINTS = 4  # the fewest of a series
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
class SizeSeries:
    """A network in several sizes and budgets; `points` are sorted by MACs, then by images."""

    name: str
    colour: int
    points: pd.DataFrame


@dataclass(frozen=True)
class ScalingLaw:
    """The law of a metric of a series: its fit to `points`, and fits of draws of their seeds."""

    form: str
    points: pd.DataFrame
    fitted: PowerLaw
    draws: list[PowerLaw]

    @property
    def unit(self) -> float:
        """The number of FLOPs of a MAC of an image, C / (N D)."""
        first = self.points.iloc[0]
        return first.flops / (first.macs * first.images)

    def front(self, law: PowerLaw) -> PowerLaw:
        """The law of compute C in FLOPs that `law` means along the compute-optimal front."""
        return law.along_front(self.unit) if self.form == SIZE_AND_IMAGES else law

    def numbers(self, law: PowerLaw) -> dict[str, float]:
        """The values of NUMBERS that the law has; sizes are in MACs, compute in FLOPs."""
        front = self.front(law)
        values = [law.offset, *front.factors, *front.exponents]
        if self.form == SIZE_AND_IMAGES:
            (size, images), (a, b) = law.factors, law.exponents
            values += [size, a, images, b, law.optimal_size_exponent]
        return dict(zip(NUMBERS, values, strict=False))

    @property
    def flops(self) -> NDArray:
        """Up to 60 FLOPs at which the front is known, in a row: there are points on both sides.

        A front of size and images is known where its optimum is within both; maybe nowhere.
        """
        found = np.geomspace(self.points.flops.min(), self.points.flops.max(), 60)
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
            both = min(map(distinct, variables(each.points, SIZE_AND_IMAGES))) >= VARIED
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


def size_series(found: Collection, metric: Quantity) -> list[SizeSeries]:
    """Finds arms that differ in numbers below `backbone.`, tuned values and length alone.

    Texts, switches and classes below `backbone.` are no sizes. A series has at least 3 amounts of
    training FLOPs, 4 arms, 2 sizes and 2 numbers of images, and a value of the metric.
    """
    values = {arm: [*own] for arm, own in found.values(metric.name).groupby("arm").value}
    rows = []
    for arm in found.arms:
        images, flops = arm.fact("images_seen") or 0.0, arm.runs[0].summary.flops
        if arm.fact("macs") and flops(1):
            cost = (arm.fact("macs"), images, flops(images) or 0.0)
            rows.append((arm, *_parted(arm), *cost, values.get(arm.name, [])))
    arms = pd.DataFrame(rows, columns=["arm", "fixed", "size", "macs", "images", "flops", "runs"])
    series = []
    for fixed, own in arms.groupby("fixed", sort=False):
        names = _names(own["size"].unique())
        points = own.assign(size=own["size"].map(names)).sort_values(["macs", "size", "images"])
        enough = all(distinct(own[key]) >= n for key, n in FEWEST.items()) and len(own) >= POINTS
        known = points[points.runs.astype(bool)]
        if enough and len(known):
            series.append((fixed, own.arm.iloc[0], known.assign(mean=known.runs.map(np.mean))))
    names = _names([fixed for fixed, _, _ in series])
    return [
        SizeSeries(arm.runs[0].network if names[fixed] == ALL else names[fixed], place, points)
        for place, (fixed, arm, points) in enumerate(series)
    ]


def _names(settings: Iterable[str]) -> dict[str, str]:
    """The names of settings that are written in JSON."""
    plain = [json.loads(each) for each in settings]
    return dict(zip(settings, names_of(plain, varying(plain)), strict=True))


def _parted(arm: Arm) -> tuple[str, str]:
    """The settings that arms of a series have in common, and those that are its size, as JSON."""
    tuned = OmegaConf.select(arm.runs[0].config, "tuning.values") or {}
    fixed, size = {}, {}
    for key, value in arm.settings.items():
        values = value if isinstance(value, list) else [value]
        numbers = (isinstance(each, int | float) and not isinstance(each, bool) for each in values)
        if key.startswith(NETWORK) and all(numbers):
            size[key] = value
        # values that were tuned for each size, and the length of training, are neither
        elif key not in LENGTH and FOLLOWS.get(key, key) not in tuned:
            fixed[key] = value
    return json.dumps(fixed, sort_keys=True), json.dumps(size, sort_keys=True)


def distinct(amounts: Iterable[float]) -> int:
    """The number of amounts that differ by more than 5 % from the next smaller one."""
    count, last = 0, 0.0
    for amount in sorted(amounts):
        if amount > (1 + EQUAL_COST) * last:
            count, last = count + 1, amount
    return count


def law_of(known: pd.DataFrame, form: str, draws: int = DRAWS) -> ScalingLaw:
    """Fits a law of one form to points, that of compute to their front; may raise NoLaw."""
    points = on_front(known) if form == COMPUTE else known
    x = variables(points, form)
    if form == SIZE_AND_IMAGES and min(map(distinct, x)) < VARIED:
        raise NoLaw(f"it needs {VARIED} sizes and {VARIED} numbers of images")
    fitted = fit(x, points["mean"])
    return ScalingLaw(form, points, fitted, bootstrap(fitted, x, [*points.runs], draws))


def row_on(law: ScalingLaw, known: pd.DataFrame) -> dict:
    """The numbers of a law of some of the known points with their intervals, and of its fit."""
    points, drawn = law.points, [law.numbers(each) for each in law.draws]
    row: dict = {"points": len(points), "seeds": points.runs.map(len).min()}
    row["fit_error"] = misfit(law.fitted, variables(points, law.form), points["mean"]).max()
    for name, value in law.numbers(law.fitted).items():
        low, high = interval([each[name] for each in drawn]) if drawn else (None, None)
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    if law.form == COMPUTE:
        # beyond these nothing was trained, so that a front of them need not be compute-optimal
        ends = [
            (key, end) for key in ("macs", "images") for end in (known[key].min(), known[key].max())
        ]
        row["at_the_border"] = sum(
            any(distinct([end, point[key]]) == 1 for key, end in ends)
            for point in points.to_dict("records")
        )
    row["extrapolated"] = law.form == SIZE_AND_IMAGES and not len(law.flops)
    return row | _held_out(law, known)


def _held_out(law: ScalingLaw, known: pd.DataFrame) -> dict:
    """How far the law of the other sizes is off at the largest one, at most; or the reason."""
    largest = known["size"].iloc[-1]
    found: dict = {"held_out": largest}
    smaller = known[known["size"] != largest]
    own = law.points[law.points["size"] == largest]
    if own.empty:
        return found | {"reason": "it is nowhere on the compute-optimal front"}
    try:
        other = law_of(smaller, law.form, draws=0).fitted
    except NoLaw as reason:
        return found | {"reason": str(reason)}
    errors = misfit(other, variables(own, law.form), own["mean"])
    # a guess that knows no law: the next smaller size's value after as many images
    next_smaller = smaller[smaller["size"] == smaller["size"].iloc[-1]]
    pairs = own.merge(next_smaller, how="cross", suffixes=("", "_guessed"))
    alike = [distinct(each) == 1 for each in zip(pairs.images, pairs.images_guessed, strict=True)]
    guesses = (pairs.mean_guessed / pairs["mean"] - 1).abs()[alike]
    found |= {"held_out_error": errors.max(), "held_out_points": len(own)}
    return found | {"held_out_unchanged": guesses.max()}


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """The Pareto front of points (cost, value): their indices, sorted by cost."""
    sign = -1 if higher_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    best: list[int] = []
    for place in order:
        if not best or sign * points[place][1] < sign * points[best[-1]][1]:
            best.append(place)
    return best


def on_front(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no cheaper one equals: the compute-optimal front, by FLOPs."""
    return points.iloc[front([*zip(points.flops, points["mean"], strict=True)], False)]


def variables(points: pd.DataFrame, form: str) -> NDArray:
    """The variables of a form at P points: (1, P) FLOPs, or (2, P) MACs and images."""
    return points[["flops"] if form == COMPUTE else ["macs", "images"]].to_numpy().T
