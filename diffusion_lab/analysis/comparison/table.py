"""One table, a row a composition, for people (Markdown, LaTeX) and for programs (CSV)."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffusion_lab.analysis.comparison.fairness import runs_of
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.measurements import judged_by
from diffusion_lab.analysis.comparison.pairs import Pair
from diffusion_lab.analysis.comparison.significance import half_width
from diffusion_lab.common.formats import amount, duration, gibibytes, percent, plain, with_spread
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
class Column:
    """A figure of each group; `judges` if it is a metric and no cost."""

    kind: str
    title: str
    unit: str
    say: Callable[[float], str]
    scale: float = 1.0  # of the unit
    judges: bool = False


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its ±, as people read it, and the mean for sorting."""

    value: float | None
    main: str
    spread: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return " ± ".join(filter(None, (self.main, self.spread))) + self.mark


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
    values = [column.scale * value for value in group.values(column.kind)]
    if not values:
        return Cell(None, NONE)
    mean = statistics.mean(values)
    if not column.judges:
        return Cell(mean, column.say(mean))
    percent = " %" if column.scale == 100 else ""
    if len(values) > 1:
        main, spread = with_spread(mean, half_width(values))
        return Cell(mean, main, spread + percent)
    deviation = group.jackknife if column.kind == "fid" else None
    if deviation is not None:
        return Cell(mean, *with_spread(mean, deviation), ONE_SEED)
    return Cell(mean, column.say(mean))


def real_values(groups: Sequence[Group], columns: Sequence[Column]) -> list[Cell]:
    """What real images have in the place of samples, in each column."""
    cells = []
    for column in columns:
        found = [v for group in groups for v in group.values(f"{column.kind}{REAL}")]
        value = column.scale * found[0] if found else None
        missing = Cell(None, NONE if column.judges else "")
        cells.append(missing if value is None else Cell(value, column.say(value)))
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
        "| composition | seeds | " + " | ".join(column.title for column in columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for group, row in zip(groups, cells, strict=True):
        name = group.name.replace("|", "\\|")
        lines.append(f"| {name} | {len(group.members)} | " + " | ".join(map(str, row)) + " |")
    lines.append("| real images | | " + " | ".join(map(str, real)) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(notes(groups, cells)) + "\n"


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
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "\N{MIDDLE DOT}": r"$\cdot$",
    NONE: "--",
}


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)


def as_csv(groups: Sequence[Group]) -> str:
    """Means, bounds of intervals and numbers of seeds, in base units, without rounding."""
    columns = columns_of(groups)
    keys = list(groups[0].settings)
    head = ["composition", *keys, "seeds"]
    for column in columns:
        head.append(column.kind)
        if column.judges:
            head += [f"{column.kind}_low", f"{column.kind}_high", f"{column.kind}_real"]
    if any(column.kind == "fid" for column in columns):
        head.append("fid_jackknife")
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for group in groups:
        row: dict[str, object] = {
            "composition": group.name,
            "seeds": len(group.members),
        } | group.settings
        for column in columns:
            values = group.values(column.kind)
            if not values:
                continue
            mean = row[column.kind] = statistics.mean(values)
            if column.judges and len(values) > 1:
                width = half_width(values)
                row[f"{column.kind}_low"] = mean - width
                row[f"{column.kind}_high"] = mean + width
            if column.judges and (real := group.values(f"{column.kind}{REAL}")):
                row[f"{column.kind}_real"] = real[0]
        if (deviation := group.jackknife) is not None:
            row["fid_jackknife"] = deviation
        writer.writerow(row)
    return text.getvalue()


def pairs_csv(tests: Mapping[str, Sequence[Pair]]) -> str:
    """Every pair, by the kind of its metric, without rounding; gaps are of behind from ahead.

    What was not tested has no detectable gap and no p.
    """
    text = io.StringIO()
    head = ("metric", "data", "ahead", "behind", "seeds", "gap", "half_width", "detectable")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "p", "holm", "told_apart"])
    for kind, pairs in tests.items():
        for pair in pairs:
            seeds = " ".join(map(str, pair.seeds))
            row = (kind, pair.size, pair.ahead.name, pair.behind.name, seeds, pair.gap)
            tested = pair.tested
            p = (pair.detectable, tested.p, tested.corrected) if tested else (None,) * 3
            writer.writerow([*row, pair.half_width, *p, pair.told_apart])
    return text.getvalue()
