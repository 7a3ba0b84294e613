"""The table with a row per composition, for people (Markdown, LaTeX) and programs (CSV)."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.groups import Group, half_width, real_value, runs_of
from diffusion_lab.analysis.comparison.measurements import tabled
from diffusion_lab.common import formats
from diffusion_lab.metrics import Quantity

NONE = "\N{EN DASH}"
SIZE = "training_images"
INTERVAL_NOTE = "± is half of the 95 % confidence interval over seeds (Student's t)."
SAMPLES_NOTE = (
    "FID std is the jackknife standard deviation over the samples of a run, not over training runs."
)


@dataclass(frozen=True)
class Cell:
    """A table cell: the mean over seeds and its ± as text, and the mean as a number to sort by."""

    value: float | None
    main: str
    spread: str = ""

    def __str__(self) -> str:
        return " ± ".join(filter(None, (self.main, self.spread)))


@dataclass(frozen=True)
class Column:
    """A column of the table; `judges` is True for a metric and False for a cost."""

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

    def mean(self, group: Group) -> Cell:
        """The cell of a group's mean; a metric has ± over several seeds."""
        return self.of(group.values(self.kind))

    def of(self, values: Sequence[float]) -> Cell:
        """The cell of the mean of values, one of each seed; a metric has ± over several."""
        if not values:
            return Cell(None, NONE)
        mean = statistics.mean(values)
        if self.judges and len(values) > 1:
            numbers = self.scale * mean, self.scale * half_width(values)
            main, spread = formats.with_spread(*numbers)
            return Cell(numbers[0], main, spread + " %" * (self.scale == 100))
        return self.cell(mean)

    def real(self, groups: Sequence[Group]) -> Cell:
        """The cell of real images, which were measured in place of samples."""
        value = real_value(groups, self.kind)
        return self.cell(value) if value is not None or self.judges else Cell(None, "")

    def numbers(self, group: Group) -> Iterator[tuple[str, float | None]]:
        """Yields (name, value) in base units: mean, bounds of its interval, and real images."""
        mean = group.mean(self.kind) if group.values(self.kind) else None
        yield self.kind, mean
        if self.judges:
            width = group.half_width(self.kind)
            ends = (None, None) if mean is None or width is None else (mean - width, mean + width)
            yield from zip((f"{self.kind}_low", f"{self.kind}_high"), ends, strict=True)
            yield f"{self.kind}_real", real_value([group], self.kind)


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

TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "\N{MIDDLE DOT}": r"$\cdot$",
        NONE: "--",
    }
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


def column_of(metric: Quantity) -> Column:
    """The column of a metric."""
    say = formats.percent if metric.percent else formats.plain
    meaning = f"{metric.meaning}; {metric.direction}"
    return Column(metric.name, metric.title, meaning, say, metric.scale, judges=True)


@dataclass(frozen=True)
class CompositionTable:
    """The table of a comparison's groups; `names` are the metrics' full names by short ones."""

    groups: Sequence[Group]
    names: Mapping[str, str]

    @cached_property
    def columns(self) -> list[Column]:
        """The columns that have a value; the size of the data only if there are several sizes."""
        one_size = len({group.data_size for group in self.groups}) == 1
        metrics = [column_of(metric) for metric in tabled(runs_of(self.groups))]
        place = next(i for i, column in enumerate(metrics, 1) if column.kind == "fid")
        metrics.insert(place, FID_STD)
        return [
            column
            for column in (*COLUMNS[one_size:], *metrics)
            if any(group.values(column.kind) for group in self.groups)
        ]

    @cached_property
    def rows(self) -> list[list[Cell]]:
        """The cells of each group."""
        return [[column.mean(group) for column in self.columns] for group in self.groups]

    def cells_of(self, run: Run) -> list[Cell]:
        """The cells of a single run."""
        return [column.cell(run.values.get(column.kind)) for column in self.columns]

    @cached_property
    def real(self) -> list[Cell]:
        """The cells of real images."""
        return [column.real(self.groups) for column in self.columns]

    @property
    def notes(self) -> list[str]:
        """Explanations of the signs that occur in the table."""
        several = any(len(group.runs) > 1 for group in self.groups)
        return [INTERVAL_NOTE] * several + [SAMPLES_NOTE] * (FID_STD in self.columns)

    def lines(self, *head: str) -> list[list[str]]:
        """The table as text: the headings, which begin with `head`, the groups, and real images."""
        rows = zip(self.groups, self.rows, strict=True)
        return [
            [*head, *(column.title for column in self.columns)],
            *([group.name, str(len(group.runs)), *map(str, row)] for group, row in rows),
            ["real images", "", *map(str, self.real)],
        ]

    def markdown(self) -> str:
        """The table for a README."""
        head, *body = self.lines("composition", "seeds")
        return "\n".join([formats.literal_table(head, body), *self.notes]) + "\n"

    def latex(self) -> str:
        """The table for a paper; needs the package booktabs."""
        head, *body, real = (
            " & ".join(each.translate(TEX) for each in line) + r" \\"
            for line in self.lines("Composition", "Seeds")
        )
        lines = [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{lr{'r' * len(self.columns)}}}",
            *(r"\toprule", head, r"\midrule", *body, r"\midrule", real, r"\bottomrule"),
            r"\end{tabular}",
            *(f"% {note.translate(TEX)}" for note in self.notes),
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Means, bounds of intervals and numbers of seeds, in base units, without rounding."""
        read_by = {"classifier": name.split("/")[1]} if (name := self.names.get("accuracy")) else {}
        rows = []
        for group in self.groups:
            row = {"composition": group.name, **group.settings, "seeds": len(group.runs)}
            row |= dict(pair for column in self.columns for pair in column.numbers(group))
            rows.append(row | read_by)
        return formats.csv_text(rows[0], [row.values() for row in rows])

    def runs_csv(self, places: Mapping[Path, str] | None = None) -> str:
        """A row for each run: costs by short names and metrics by full names, without rounding.

        `places` are texts to write for the run folders.
        """
        rows = [(group, run) for group in self.groups for run in group.runs]
        kinds = dict.fromkeys(kind for _, run in rows for kind in run.values)
        head = ["composition", "seed", "folder", *(self.names.get(kind, kind) for kind in kinds)]
        return formats.csv_text(
            head,
            (
                [
                    g.name,
                    r.seed,
                    (places or {}).get(r.folder, r.folder),
                    *(r.values.get(kind) for kind in kinds),
                ]
                for g, r in rows
            ),
        )
