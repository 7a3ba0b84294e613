"""Formats numbers and tables for people and for programs."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence

SHOWN = 5  # most names in a message


def amount(value: float) -> str:
    """A number with three digits and a letter for thousands, millions, ...: 35.7M."""
    for letter, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * unit:  # which is 1 in three digits
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A duration in hours, minutes or seconds: 1.5 h, 6.6 min, 12 s."""
    for word, unit in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.3g} {word}"
    return f"{seconds:.3g} s"


def plain(value: float) -> str:
    """A number with four digits, or with two if it is below 0.1: 468.8, 0.247, -0.0027."""
    return f"{value:.4g}" if abs(value) >= 0.1 else f"{value:.2g}"


def percent(value: float) -> str:
    """A percentage with one decimal: 66.2 %."""
    return f"{value:.1f} %"


def gibibytes(size: float) -> str:
    """A size in bytes, in GiB with three digits: 1.25 GiB."""
    return f"{size / 2**30:.3g} GiB"


def with_spread(mean: float, spread: float) -> tuple[str, str]:
    """Both numbers to the second digit of the spread, with one decimal at least: 468.8 and 44.2."""
    if spread <= 0:
        return f"{mean:.4g}", "0"
    digits = min(max(1 - math.floor(math.log10(spread)), 1), 9)
    return f"{mean:.{digits}f}", f"{spread:.{digits}f}"


def joined(names: Sequence[str]) -> str:
    """One or more names as words: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def some(names: Sequence[object], total: int | None = None) -> str:
    """The first few names, and how many more there are; of `total` if not all are given."""
    total = len(names) if total is None else total
    more = f" and {total - SHOWN:,} more" if total > SHOWN else ""
    return f"{', '.join(map(str, names[:SHOWN]))}{more}"


def csv_text(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table as CSV, without rounding; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def literal(text: object) -> str:
    """A text in Markdown, in one line, that may be anyone's: no HTML, link, code or cell begins."""
    escaped = re.sub(r"[\\`<\[]", r"\\\g<0>", " ".join(str(text).splitlines()))
    return escaped.replace("|", "&#124;")


def literal_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown, of texts that may be anyone's."""
    return markdown_table([*map(literal, head)], (map(literal, row) for row in rows))


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown, right-aligned in all columns but the first."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
