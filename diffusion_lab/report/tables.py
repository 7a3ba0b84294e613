"""Tables of a comparison, for people (Markdown, LaTeX) and programs (CSV)."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from diffusion_lab.common import formats
from diffusion_lab.metrics.quantity import REAL, Quantity
from diffusion_lab.report.arms import Arm
from diffusion_lab.report.facts import classifier_of
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.records import whole
from diffusion_lab.report.tests import Panel, half_width

NONE = "\N{EN DASH}"
SIZE = "training_images"
TIMES = ("images_per_second", "training_seconds")
FEW = 3  # runs of which a table shows the range in place of an interval
INTERVAL_NOTE = "± is half of the 95 % confidence interval over seeds (Student's t)."
RANGE_NOTE = "Of two or three runs the smallest and the largest value stand in brackets."
SAMPLES_NOTE = (
    "FID std is the jackknife standard deviation over the samples of a run, not over training runs."
)
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

    def cell(self, value: float | None) -> Cell:
        """The cell of a single value."""
        if value is None:
            return Cell(None, NONE)
        return Cell(self.scale * value, self.say(self.scale * value))

    def of(self, values: Sequence[float], ranges: bool = False) -> Cell:
        """The cell of the mean of values, one of each seed; a metric has ± over several.

        With `ranges`, two or three values have their range.
        """
        if not values:
            return Cell(None, NONE)
        mean = statistics.mean(values)
        if not self.judges or len(values) < 2:
            return self.cell(mean)
        if ranges and len(values) <= FEW:
            ends = (self.say(self.scale * end).removesuffix(" %") for end in sorted(values))
            low, *_, high = ends
            return Cell(self.scale * mean, self.say(self.scale * mean), f" ({low} to {high})")
        numbers = self.scale * mean, self.scale * half_width(values)
        main, spread = formats.with_spread(*numbers)
        return Cell(numbers[0], main, f" ± {spread}" + " %" * (self.scale == 100))


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
FID_STD = Column("fid_std", "FID std", "jackknife over samples, mean over seeds", formats.plain)


def column_of(metric: Quantity) -> Column:
    """The column of a metric."""
    say = formats.percent if metric.percent else formats.plain
    meaning = f"{metric.meaning}; {metric.direction}"
    return Column(metric.name, metric.title, meaning, say, metric.scale, judges=True)


@dataclass(frozen=True)
class ArmTable:
    """The table with a row for each arm; columns of the kinds `without` are left out."""

    found: Collection
    ranges: bool = True  # whether two or three runs have their range in place of an interval
    without: Sequence[str] = ()

    @cached_property
    def by_run(self) -> dict[tuple[str, str], dict[int, float]]:
        """The value of each seed, by the names of the arm and of the metric or cost."""
        ends = self.found.ends()
        found: dict[tuple[str, str], dict[int, float]] = {}
        keys = ["arm", "metric", "seed"]
        for (arm, metric, seed), value in ends.groupby(keys, sort=False).value.mean().items():
            found.setdefault((arm, metric), {})[seed] = value
        return found

    def values(self, arm: Arm, kind: str) -> list[float]:
        return [*self.by_run.get((arm.name, kind), {}).values()]

    @cached_property
    def columns(self) -> list[Column]:
        """The columns that have a value; the size of the data only if there are several sizes."""
        one_size = len({arm.data for arm in self.found.arms}) == 1
        metrics = [column_of(metric) for metric in self.found.metrics.values()]
        place = next((i for i, column in enumerate(metrics, 1) if column.kind == "fid"), 0)
        metrics.insert(place, FID_STD)
        kinds = {kind for _, kind in self.by_run} - {*self.without}
        return [each for each in (*COLUMNS[one_size:], *metrics) if each.kind in kinds]

    def cell(self, arm: Arm, column: Column) -> Cell:
        return column.of(self.values(arm, column.kind), self.ranges)

    def cells_of(self, arm: Arm, seed: int) -> list[Cell]:
        """The cells of a single run."""
        own = (self.by_run.get((arm.name, each.kind), {}).get(seed) for each in self.columns)
        return [column.cell(value) for column, value in zip(self.columns, own, strict=True)]

    def real(self, column: Column) -> Cell:
        """The cell of real images, which were measured in place of samples."""
        value = self.found.real(column.kind)
        return column.cell(value) if value is not None or column.judges else Cell(None, "")

    @property
    def notes(self) -> list[str]:
        """Explanations of the signs that occur in the table."""
        counts = {len(arm.runs) for arm in self.found.arms} - {1}
        few = self.ranges and min(counts, default=FEW + 1) <= FEW
        several = bool(counts) and (not self.ranges or max(counts) > FEW)
        notes = [INTERVAL_NOTE] * several + [RANGE_NOTE] * few
        return notes + [SAMPLES_NOTE] * (FID_STD in self.columns)

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
        classifier = classifier_of(self.found.names)
        rows = []
        for arm in self.found.arms:
            row = {"composition": arm.name, **arm.settings, "seeds": len(arm.runs)}
            for column in self.columns:
                row |= self._numbers(arm, column)
            rows.append(row | ({"classifier": classifier} if classifier else {}))
        return formats.csv_text(rows[0], [row.values() for row in rows])

    def _numbers(self, arm: Arm, column: Column) -> dict[str, object]:
        values = self.values(arm, column.kind)
        mean = statistics.mean(values) if values else None
        if not column.judges:
            return {column.kind: whole(mean)}
        ends: tuple[float | None, float | None] = (None, None)
        if mean is not None and len(values) > 1:
            ends = (mean - half_width(values), mean + half_width(values))
        names = (column.kind, *(f"{column.kind}_{end}" for end in ("low", "high", "real")))
        real = next(iter(self.by_run.get((arm.name, f"{column.kind}{REAL}"), {}).values()), None)
        numbers = map(whole, (mean, *ends, real))
        return dict(zip(names, numbers, strict=True))

    def runs_csv(self, places: Mapping[Path, str] | None = None) -> str:
        """A row for each run: costs by short names and metrics by full names, without rounding.

        `places` are texts to write for the run folders.
        """
        names = self.found.names
        kinds = list(dict.fromkeys(kind for _, kind in self.by_run))
        head = ["composition", "seed", "folder", *(names.get(kind, kind) for kind in kinds)]
        rows = []
        for arm in self.found.arms:
            for run in arm.runs:
                own = (self.by_run.get((arm.name, kind), {}).get(run.seed) for kind in kinds)
                place = (places or {}).get(run.folder, run.folder)
                rows.append([arm.name, run.seed, place, *map(whole, own)])
        return formats.csv_text(head, rows)


@dataclass(frozen=True)
class SamplingTable:
    """The judged metrics of arms by each sampling, those of an arm side by side."""

    found: Collection

    @cached_property
    def columns(self) -> list[Column]:
        """The judged metrics that some arm has by another sampling; losses have none."""
        frame = self.found.frame
        have = set(frame[frame.sampling.isin(self.found.ways[1:])].metric)
        return [column_of(metric) for metric in self.found.judged if metric.name in have]

    @property
    def head(self) -> list[str]:
        return ["composition", "sampling", *(column.title for column in self.columns)]

    @property
    def rows(self) -> Iterator[tuple[Arm, str, list[Cell]]]:
        """Yields each arm with the settings of a sampling, and its cells."""
        ends = {way: self.found.ends(way) for way in self.found.ways}
        for arm in self.found.arms:
            for way, frame in ends.items():
                own = frame[(frame.arm == arm.name) & (frame.sampling == way)]
                runs = own.groupby(["metric", "seed"]).value.mean()
                known = {kind: [*runs[kind]] for kind in own.metric.unique()}
                yield arm, way, [c.of(known.get(c.kind, []), ranges=True) for c in self.columns]

    def markdown(self) -> str:
        """The table for a README."""
        rows = ([arm.name, way, *cells] for arm, way, cells in self.rows)
        return formats.literal_table(self.head, rows)

    def csv(self) -> str:
        """A row for each run by each sampling, with values of real images, without rounding."""
        kinds = [f"{column.kind}{end}" for column in self.columns for end in ("", REAL)]
        frame = self.found.frame
        own = frame[frame.at_end & frame.sampling.isin(self.found.ways)]
        known = own.rename(columns={"arm": "composition"}).pivot_table(
            "value", ["composition", "sampling", "seed"], "metric"
        )
        return known.reindex(columns=kinds).to_csv()


def pairs_csv(primary: Iterable[Panel], others: Iterable[Panel]) -> str:
    """Every pair by every metric, without rounding; a gap is that of `behind` less `ahead`.

    Metrics beside the primary one have intervals alone, without p-values.
    """
    frames = [_rows_of(panel) for panel in primary]
    frames += [_rows_of(panel).drop(columns=TESTED) for panel in others]
    known = [frame for frame in frames if len(frame)]
    whole = pd.concat(known) if known else pd.DataFrame()
    return whole.reindex(columns=PAIR_COLUMNS).to_csv(index=False)


def _rows_of(panel: Panel) -> pd.DataFrame:
    return panel.pairs.assign(metric=panel.metric.name, data=panel.data)
