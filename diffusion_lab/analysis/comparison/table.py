"""One table, a row a composition, for people (Markdown, LaTeX) and for programs (CSV)."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_lab.analysis.comparison.fairness import runs_of
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.measurements import judged_by
from diffusion_lab.analysis.comparison.pairs import Pair
from diffusion_lab.analysis.comparison.significance import half_width
from diffusion_lab.common.formats import (
    amount,
    csv_text,
    duration,
    gibibytes,
    markdown_table,
    percent,
    plain,
    with_spread,
)
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.metric import REAL

NONE = "\N{EN DASH}"
SIZE = "training_images"
ONE_SEED = "†"
ONE_SEED_NOTE = (
    f"{ONE_SEED} one seed: ± is the jackknife standard deviation over samples, not over trainings."
)
INTERVAL_NOTE = "± is half of the 95 % confidence interval over seeds (Student's t)."


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its ±, as people read it, and the mean for sorting."""

    value: float | None
    main: str
    spread: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return " ± ".join(filter(None, (self.main, self.spread))) + self.mark


@dataclass(frozen=True)
class Column:
    """A figure of each group; `judges` if it is a metric and no cost."""

    kind: str
    title: str
    unit: str
    say: Callable[[float], str]
    scale: int = 1  # of the unit
    judges: bool = False

    def cell(self, value: float | None) -> Cell:
        """One value as people read it."""
        if value is None:
            return Cell(None, NONE)
        return Cell(self.scale * value, self.say(self.scale * value))


COLUMNS = (
    Column(SIZE, "Trained on", "images of the training data", amount),
    Column("images_seen", "Images", "images trained on", amount),
    Column("parameters", "Params", "", amount),
    Column("macs", "MACs", "multiply-accumulates of a call on one image", amount),
    Column("images_per_second", "Images/s", "in training, median", amount),
    Column("training_seconds", "Time", "wall clock of training, with validation", duration),
    Column("peak_memory", "Memory", "peak in training", gibibytes),
)


def columns_of(groups: Sequence[Group]) -> list[Column]:
    """Those that some group has a value of; the size of the data where there are several."""
    judged = map(column_of, judged_by(runs_of(groups)))
    known = [c for c in (*COLUMNS, *judged) if any(group.values(c.kind) for group in groups)]
    one_size = len({group.data_size for group in groups}) == 1
    return known[1:] if one_size and known[0].kind == SIZE else known


def column_of(metric: Quantity) -> Column:
    """The column of a quantity that compositions are judged by."""
    say = percent if metric.percent else plain
    meaning = f"{metric.meaning}; {metric.direction}"
    return Column(metric.name, metric.title, meaning, say, metric.scale, judges=True)


def cell(group: Group, column: Column) -> Cell:
    """A group's mean; ± where it judges and more than one seed, or the jackknife, allows it."""
    values = group.values(column.kind)
    plain_cell = column.cell(statistics.mean(values) if values else None)
    if not column.judges or plain_cell.value is None:
        return plain_cell
    mean = plain_cell.value
    if len(values) > 1:
        main, spread = with_spread(mean, column.scale * half_width(values))
        return Cell(mean, main, spread + (" %" if column.scale == 100 else ""))
    if column.kind == "fid" and group.jackknife is not None:
        return Cell(mean, *with_spread(mean, group.jackknife), ONE_SEED)
    return plain_cell


def real_values(groups: Sequence[Group], columns: Sequence[Column]) -> list[Cell]:
    """What real images have in the place of samples, in each column."""
    cells = []
    for column in columns:
        found = [v for group in groups for v in group.values(f"{column.kind}{REAL}")]
        missing = NONE if column.judges else ""
        cells.append(column.cell(found[0]) if found else Cell(None, missing))
    return cells


def rows(groups: Sequence[Group]) -> tuple[list[Column], list[list[Cell]], list[Cell]]:
    """Columns, the cells of each group, and the cells of real images."""
    columns = columns_of(groups)
    cells = [[cell(group, column) for column in columns] for group in groups]
    return columns, cells, real_values(groups, columns)


def notes(groups: Sequence[Group], cells: list[list[Cell]]) -> list[str]:
    """What the signs in the table mean, as far as they are there."""
    said = [INTERVAL_NOTE] if any(len(group.members) > 1 for group in groups) else []
    return said + [ONE_SEED_NOTE] * any(each.mark for row in cells for each in row)


def markdown(groups: Sequence[Group]) -> str:
    """The table for a README."""
    columns, cells, real = rows(groups)
    lines = [
        [group.name, len(group.members), *row] for group, row in zip(groups, cells, strict=True)
    ]
    titles = ["composition", "seeds", *(column.title for column in columns)]
    table = markdown_table(titles, [*lines, ["real images", "", *real]])
    return "\n".join([table, *notes(groups, cells)]) + "\n"


def latex(groups: Sequence[Group]) -> str:
    """The table for a paper; needs the package booktabs."""
    columns, cells, real = rows(groups)

    def line(name: str, seeds: str, row: Sequence[object]) -> str:
        return " & ".join([_tex(name), seeds, *(_tex(str(each)) for each in row)]) + r" \\"

    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lr" + "r" * len(columns) + "}",
        r"\toprule",
        line("Composition", "Seeds", [column.title for column in columns]),
        r"\midrule",
        *(
            line(group.name, str(len(group.members)), row)
            for group, row in zip(groups, cells, strict=True)
        ),
        r"\midrule",
        line("real images", "", real),
        r"\bottomrule",
        r"\end{tabular}",
        *(f"% {_tex(note)}" for note in notes(groups, cells)),
    ]
    return "\n".join(lines) + "\n"


TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "\N{MIDDLE DOT}": r"$\cdot$",
    NONE: "--",
} | {letter: f"\\{letter}" for letter in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)


def as_csv(groups: Sequence[Group]) -> str:
    """Means, bounds of intervals and numbers of seeds, in base units, without rounding."""
    columns = columns_of(groups)
    rows = [_csv_row(group, columns) for group in groups]
    return csv_text(rows[0], [row.values() for row in rows])


def _csv_row(group: Group, columns: Sequence[Column]) -> dict[str, Any]:
    row: dict[str, Any] = {"composition": group.name, **group.settings, "seeds": len(group.members)}
    for column in columns:
        kind, values = column.kind, group.values(column.kind)
        row[kind] = statistics.mean(values) if values else None
        if column.judges:
            width = half_width(values) if len(values) > 1 else None
            for end, sign in (("low", -1), ("high", 1)):
                row[f"{kind}_{end}"] = None if width is None else row[kind] + sign * width
            row[f"{kind}_real"] = next(iter(group.values(f"{kind}{REAL}")), None)
    if any(column.kind == "fid" for column in columns):
        row["fid_jackknife"] = group.jackknife
    return row


def pairs_csv(tests: Mapping[str, Sequence[Pair]]) -> str:
    """Every pair, by the kind of its metric, without rounding; gaps are of behind from ahead.

    What was not tested has no detectable gap and no p.
    """
    head = ("metric", "data", "ahead", "behind", "seeds", "gap", "half_width", "detectable")
    rows = []
    for kind, pairs in tests.items():
        for pair in pairs:
            seeds = " ".join(map(str, pair.seeds))
            row = (kind, pair.size, pair.ahead.name, pair.behind.name, seeds, pair.gap)
            tested = pair.tested
            p = (pair.detectable, tested.p, tested.corrected) if tested else (None,) * 3
            rows.append([*row, pair.half_width, *p, pair.told_apart])
    return csv_text([*head, "p", "holm", "told_apart"], rows)
