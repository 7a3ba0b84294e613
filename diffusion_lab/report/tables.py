"""Tables of a comparison, for people (Markdown, LaTeX) and programs (CSV)."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from diffusion_lab.common import formats
from diffusion_lab.metrics.quantity import REAL, Quantity
from diffusion_lab.report.arms import Arm
from diffusion_lab.report.facts import classifier_of
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.tests import Panel, half_width, means

NONE = "\N{EN DASH}"
SIZE = "training_images"
TIMES = ("images_per_second", "training_seconds")
FEW = 3  # runs of which a table shows the range in place of an interval
INTERVAL_NOTE = "± is half of the 95 % confidence interval over seeds (Student's t)."
RANGE_NOTE = "Of two or three runs the smallest and the largest value stand in brackets."
TESTED = ["p", "corrected", "correction", "tests", "significant"]
PAIR_COLUMNS = [
    *("metric", "data", "ahead", "behind", "seeds", "gap", "low", "high", "least", "most"),
    *("relative", "relative_low", "relative_high", "better", "pairs", "detectable"),
    *("detectable_low", "detectable_high", "test", *TESTED, "p_joint", "p_welch", "p_paired"),
]


@dataclass(frozen=True)
class Cell:
    """A table cell: the mean over seeds and its spread as text, and the mean to sort by."""

    value: float | None
    main: str
    spread: str = ""

    def __str__(self) -> str:
        return self.main + self.spread


@dataclass(frozen=True)
class Column:
    """A column of a table; `judges` is True for a metric and False for a cost."""

    kind: str
    title: str
    unit: str
    say: Callable[[float], str]
    scale: int = 1  # factor from the base unit to the printed number
    judges: bool = False

    def of(self, values: Sequence[float], ranges: bool = False) -> Cell:
        """The cell of the mean of values, one of each seed; two or three may have their range."""
        if not values:
            return Cell(None, NONE)
        mean = self.scale * statistics.mean(values)
        if not self.judges or len(values) < 2:
            return Cell(mean, self.say(mean))
        if ranges and len(values) <= FEW:
            ends = (self.say(self.scale * end) for end in (min(values), max(values)))
            low, high = (end.removesuffix(" %") for end in ends)
            return Cell(mean, self.say(mean), f" ({low} to {high})")
        main, spread = formats.with_spread(mean, self.scale * half_width(values))
        return Cell(mean, main, f" ± {spread}" + " %" * (self.scale == 100))


COLUMNS = (
    Column(SIZE, "Trained on", "images in the training data", formats.amount),
    Column("images_seen", "Images", "training images seen", formats.amount),
    Column("parameters", "Params", "", formats.amount),
    Column("macs", "MACs", "multiply-accumulates of a network call on one image", formats.amount),
    Column("images_per_second", "Images/s", "median in training", formats.amount),
    Column(
        "training_seconds",
        "Time",
        "wall-clock time of training, including validation",
        formats.duration,
    ),
    Column("peak_memory", "Memory", "peak in training", formats.gibibytes),
    Column("sampling_seconds", "Drawing", "seconds per sample, drawn in batches", formats.plain),
)
FID_STD = Column(
    "fid_std", "FID std", "jackknife over the samples of a run, mean over runs", formats.plain
)


def column_of(metric: Quantity) -> Column:
    say = formats.percent if metric.percent else formats.plain
    meaning = f"{metric.meaning}; {metric.direction}"
    return Column(metric.name, metric.title, meaning, say, metric.scale, judges=True)


@dataclass(frozen=True)
class ArmTable:
    """The table with a row for each arm; columns of the kinds `without` are left out."""

    found: Collection
    ranges: bool = True  # whether two or three runs have their range in place of an interval
    without: Sequence[str] = ()
    way: str | None = None  # a sampling, the one that is compared by default

    @cached_property
    def by_run(self) -> pd.DataFrame:
        """The value of each run: a row for each arm and seed, a column for each metric or cost."""
        ends = self.found.ends(self.way)
        wide = ends.pivot_table("value", ["arm", "seed"], "metric", sort=False)
        return wide.reindex(columns=ends.metric.unique())

    @cached_property
    def columns(self) -> list[Column]:
        """The columns that have a value; the size of the data only if there are several sizes."""
        one_size = len({arm.data for arm in self.found.arms}) == 1
        metrics = [column_of(metric) for metric in self.found.metrics.values()]
        place = next((i for i, column in enumerate(metrics, 1) if column.kind == "fid"), 0)
        metrics.insert(place, FID_STD)
        kinds = {*self.by_run.columns} - {*self.without}
        return [each for each in (*COLUMNS[one_size:], *metrics) if each.kind in kinds]

    def cell(self, arm: Arm, column: Column) -> Cell:
        own = self.by_run.index.get_level_values("arm") == arm.name
        return column.of([*self.by_run[column.kind][own].dropna()], self.ranges)

    def cells_of(self, arm: Arm, seed: int) -> list[Cell]:
        own = self.by_run.loc[(arm.name, seed)].to_dict()
        return [column.of([v for v in [own[column.kind]] if v == v]) for column in self.columns]

    def real(self, column: Column) -> Cell:
        """The cell of real images, which were measured in place of samples."""
        value = self.found.real(column.kind)
        return column.of([value]) if value is not None else Cell(None, NONE * column.judges)

    @property
    def notes(self) -> list[str]:
        """Explanations of the signs that occur in the table."""
        judged = [column.kind for column in self.columns if column.judges]
        counts = {*self.by_run[judged].groupby("arm").count().to_numpy().ravel().tolist()} - {0, 1}
        few = self.ranges and min(counts, default=FEW + 1) <= FEW
        several = bool(counts) and (not self.ranges or max(counts) > FEW)
        return [INTERVAL_NOTE] * several + [RANGE_NOTE] * few

    def lines(self, *head: str) -> list[list[str]]:
        """The table as text: the headings, which begin with `head`, the arms, and real images."""
        return [
            [*head, *(column.title for column in self.columns)],
            *(
                [arm.name, str(len(arm.runs)), *(str(self.cell(arm, c)) for c in self.columns)]
                for arm in self.found.arms
            ),
            ["real images", "", *(str(self.real(column)) for column in self.columns)],
        ]

    def markdown(self) -> str:
        """The table for a README."""
        head, *body = self.lines("composition", "seeds")
        return "\n".join([formats.literal_table(head, body), *self.notes]) + "\n"

    def latex(self) -> str:
        """The table for a paper; needs the package booktabs."""
        head, *body = self.lines("Composition", "Seeds")
        layout = f"lr{'r' * len(self.columns)}"
        table = pd.DataFrame(body, columns=head)
        text = table.to_latex(index=False, escape=True, column_format=layout)
        for sign, word in {"±": r"$\pm$", "\N{MIDDLE DOT}": r"$\cdot$", NONE: "--"}.items():
            text = text.replace(sign, word)
        return text + "".join(f"% {note}\n" for note in self.notes)

    def csv(self) -> str:
        """Means, bounds of intervals and numbers of seeds, in base units, without rounding."""
        arms = self.found.arms
        rows = [{"composition": a.name, **a.settings, "seeds": len(a.runs)} for a in arms]
        settings, found = pd.DataFrame(rows).set_index("composition"), dict[str, Any]()
        for column in self.columns:
            kind = column.kind
            known = means(self.found.values(kind, self.way))
            found[kind] = known["mean"]
            if column.judges:
                real = self.found.values(kind + REAL, self.way).groupby("arm").value.first()
                found |= {f"{kind}_low": known["low"], f"{kind}_high": known["high"]}
                found[f"{kind}_real"] = real
        if classifier := classifier_of(self.found.names):
            found["classifier"] = classifier
        values = pd.DataFrame(found, index=settings.index)
        return pd.concat([settings, values], axis=1).convert_dtypes().to_csv()

    def runs_csv(self, places: Mapping[Path, str] | None = None) -> str:
        """A row for each run, at its place: costs by short names, metrics by full ones, exact."""
        known = {
            (arm.name, run.seed): (places or {}).get(run.folder, run.folder)
            for arm in self.found.arms
            for run in arm.runs
        }
        rows = self.by_run.reindex([*known]).rename(columns=self.found.names)
        rows.insert(0, "folder", [*map(str, known.values())])
        return rows.rename_axis(["composition", "seed"]).convert_dtypes().to_csv()


def samplings_csv(found: Collection) -> str:
    """A row for each run by each sampling, with values of real images, without rounding."""
    names = [metric.name for metric in found.judged if metric.name in found.resampled]
    kinds = [f"{name}{end}" for name in names for end in ("", REAL)]
    own = found.frame[found.frame.at_end & found.frame.sampling.isin(found.ways)]
    keys = ["composition", "sampling", "seed"]
    known = own.rename(columns={"arm": keys[0]}).pivot_table("value", keys, "metric")
    return known.reindex(columns=kinds).to_csv()


def pairs_csv(primary: Iterable[Panel], others: Iterable[Panel]) -> str:
    """Every pair by every metric, without rounding; p-values are the primary metric's alone."""
    frames = [each.pairs.assign(metric=each.metric.name, data=each.data) for each in primary]
    frames += [
        each.pairs.drop(columns=TESTED).assign(metric=each.metric.name, data=each.data)
        for each in others
    ]
    known = [frame for frame in frames if len(frame)]
    whole = pd.concat(known) if known else pd.DataFrame()
    return whole.reindex(columns=PAIR_COLUMNS).to_csv(index=False)
