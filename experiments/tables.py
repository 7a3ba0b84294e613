"""The tables of results in README.md files, made from published folders and CSV files.

    python experiments/tables.py           # rewrites the tables
    python experiments/tables.py --check   # exits 1, and names each table that would change

A table stands between two comments, in any README.md below this folder:

    <!-- table published columns=fid,kid rows=UNet,DiT -->
    <!-- end of table -->

`published` is a folder that `diffusion-lab publish` wrote, relative to the README. Columns are
named as in the comparison's table.csv, rows by composition; without them all are shown. With
names=U-Net,DiT the rows have these names in place of their own. Names with
blanks need quotes: rows="DiT · width=64,UNet". Several folders that are compared have commas
between them: published,published_patches.

    <!-- table samplings.csv by=network,steps columns=calls,fid where=sweep=steps -->

A CSV file, such as one of experiments/sampled.py, has a row for each seed. A row of the table has
the mean over all rows with equal values of `by`, numbers in rising order and words in that of the
file; where=sweep=steps,network=UNet|DiT chooses rows by the values of columns. With
against=steps=10, a row also has its difference from the row of 10 steps that is otherwise the
same, in the first of the columns; commas part the keys of such a row, too. With across=steps there
is a column for each number of steps, with the first of the columns or with its difference.

    <!-- table published/tuning/tuning.json -->

A study's tuning has a row for each network and a column for each value that was tried. With
tuning/*/tuning.json, the rows are those of all studies in the folder, each with its study's name.

Numbers of prose that stand before a mark are written, too; `stated.py` says how. Those of the
README.md above this folder and of docs/pages/results.md belong to them.
"""

import argparse
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from scipy import stats
from stated import collected, panels_of, rows_of, written

from diffusion_lab.common.files import read_json
from diffusion_lab.common.formats import markdown_table, plain
from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.quantity import REAL, quantity_of
from diffusion_lab.report.tables import (
    INTERVAL_NOTE,
    ArmTable,
    Column,
    column_of,
)
from diffusion_lab.report.tests import half_width, holm

HERE = Path(__file__).parent
QUOTING = ("README.md", "docs/pages/results.md")  # pages beside this folder
HEAD = 2  # columns before those of the comparison: composition and seeds
OPENS, CLOSES = "<!-- table ", "<!-- end of table -->"
BLOCK = re.compile(rf"^{OPENS}(.+?) -->\n(.*?)^{CLOSES}$", re.MULTILINE | re.DOTALL)
OF_FOLDERS, OF_FILES = ("columns", "rows", "names"), ("by", "columns", "where", "against", "across")
# the values of `by` -> the rows that have them
Groups = dict[tuple[str, ...], list[dict[str, str]]]
PAIRED_NOTE = (
    "Differences are paired by seed, with their 95 % interval. p is that of a paired t-test after "
    "Holm's correction for all tests against one row."
)


def table_of(readme: Path, words: str) -> str:
    """The table that the words of a block ask for; raises UserError for wrong ones."""
    name, *given = shlex.split(words)
    source = readme.parent / name
    known, make = {".csv": (OF_FILES, of_file), ".json": ((), of_tuning)}.get(
        source.suffix, (OF_FOLDERS, of_folders)
    )
    options = dict(each.partition("=")[::2] for each in given)
    if unknown := sorted(options.keys() - set(known)):
        raise UserError(
            f"{unknown[0]} is not known in this table; use {' or '.join(known) or 'no option'}"
        )
    return make(source, options)


def of_folders(folders: Path, options: dict[str, str]) -> str:
    """The table of a published folder, or of several beside each other, `first,second`."""
    table = ArmTable(collected(folders), ranges=False)
    kinds = [column.kind for column in table.columns]
    shown = chosen("columns", options, kinds)
    head, *body = table.lines("composition", "seeds")
    places = [*range(HEAD), *(HEAD + kinds.index(kind) for kind in shown)]
    by_name = {line[0]: [line[place] for place in places] for line in body}
    rows = chosen("rows", options, list(by_name))
    names = options["names"].split(",") if "names" in options else rows
    if len(names) != len(rows):
        raise UserError(f"names= has {len(names)} names, and rows= {len(rows)}; name each row")
    lines = [[name, *by_name[row][1:]] for name, row in zip(names, rows, strict=True)]
    return with_notes(markdown_table([head[place] for place in places], lines), table.notes)


def with_notes(table: str, notes: Sequence[str]) -> str:
    return "\n".join([table, *notes, ""]) if notes else table


def of_file(path: Path, options: dict[str, str]) -> str:
    """The table of a CSV file with a row for each seed."""
    rows = rows_of(path, options.get("where"))
    if missing := [option for option in ("by", "columns") if option not in options]:
        raise UserError(f"write {missing[0]}= and some of {', '.join(rows[0])}")
    by, kinds = (chosen(option, options, list(rows[0])) for option in ("by", "columns"))
    if "across" in options:
        across, *more = chosen("across", options, by)
        if more:
            raise UserError(f"across={options['across']} names several columns; write one")
        by = [*(each for each in by if each != across), across]
    groups = grouped(rows, by)
    columns = [
        column_of(quantity) if (quantity := quantity_of(kind)) else Column(kind, kind, "", plain)
        for kind in kinds
    ]

    def cells(own: list[dict[str, str]], after: str = "") -> list[str]:
        pairs = zip(columns, kinds, strict=True)
        return [str(column.of(numbers(own, kind + after))) for column, kind in pairs]

    gaps: dict[tuple[str, ...], list[str]] = {}
    if "against" in options:
        gaps = differences(groups, by, options["against"], kinds[0], columns[0].scale)
    if "across" in options:
        if "against" in options:
            found = {key: ", p = ".join(gap) for key, gap in gaps.items()}
            note = f"{columns[0].title} less that of {options['against']}. {PAIRED_NOTE}"
        else:
            found = {key: cells(own)[0] for key, own in groups.items()}
            note = INTERVAL_NOTE
        return with_notes(crossed(groups, by, found), [note])
    lines = [[*key, str(len(own)), *cells(own)] for key, own in groups.items()]
    head = [*by, "seeds", *(column.title for column in columns)]
    notes = [INTERVAL_NOTE] * any(len(own) > 1 for own in groups.values())
    if any(kind + REAL in rows[0] for kind in kinds):
        real = zip(columns, cells(rows[:1], REAL), strict=True)
        shown = [cell if column.judges else "" for column, cell in real]
        lines.append(["real images", *[""] * len(by), *shown])
    if "against" in options:
        words = ", ".join(re.findall("=([^,]*)", options["against"]))
        head += [f"{columns[0].title} less that of {words}", "p"]
        for key, line in zip_longest(groups, lines):
            line += gaps.get(key, ["", ""])
        notes.append(PAIRED_NOTE)
    return with_notes(markdown_table(head, lines), notes)


def grouped(rows: list[dict[str, str]], by: list[str]) -> Groups:
    """The rows with equal values of `by`: numbers in rising order, words in that of the file."""
    for name in reversed(by):
        words = list(dict.fromkeys(row[name] for row in rows))
        rows.sort(key=lambda row: (number_of(row[name]), words.index(row[name])))
    groups: Groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    for key, own in groups.items():
        seeds = [row.get("seed") for row in own]
        repeated = "seed" in own[0] and len(set(seeds)) < len(own)
        if repeated or len({row.get("protocol") for row in own}) > 1:
            raise UserError(
                f"by={','.join(by)} puts several rows of a seed, or several protocols, in one row, "
                f"{', '.join(key)}; name more columns there, or choose rows by where="
            )
    return groups


def crossed(groups: Groups, by: list[str], cells: dict[tuple[str, ...], str]) -> str:
    """A table with a column for each value of the last of `by`."""
    *names, across = by
    places = sorted(dict.fromkeys(key[-1] for key in groups), key=number_of)
    counts: dict[tuple[str, ...], list[int]] = {}
    for key, rows in groups.items():
        counts.setdefault(key[:-1], []).append(len(rows))
    seeds = {
        key: str(min(own)) if min(own) == max(own) else f"{min(own)} to {max(own)}"
        for key, own in counts.items()
    }
    lines = [
        [*key, count, *(cells.get((*key, place), "") for place in places)]
        for key, count in seeds.items()
    ]
    return markdown_table([*names, "seeds", *(f"{across}={place}" for place in places)], lines)


def differences(
    groups: Groups, by: list[str], against: str, kind: str, scale: float
) -> dict[tuple[str, ...], list[str]]:
    """The paired difference of each group from the one that `against` names, and its p-value."""
    named = dict(each.partition("=")[::2] for each in against.split(","))
    if unknown := named.keys() - set(by):
        raise UserError(f"against={against} needs {unknown.pop()} in by={','.join(by)}")
    gaps: dict[tuple[str, ...], dict[tuple[str, ...], list[float]]] = {}
    for key, rows in groups.items():
        base = tuple(named.get(name, value) for name, value in zip(by, key, strict=True))
        if base not in groups:
            raise UserError(f"against={against}: there is no row {', '.join(base)}")
        theirs = {row["seed"]: float(row[kind]) for row in groups[base] if row[kind]}
        pairs = [
            (float(r[kind]), theirs[r["seed"]]) for r in rows if r[kind] and r["seed"] in theirs
        ]
        own = [scale * (ours - others) for ours, others in pairs]
        if key != base and len(set(own)) > 1:
            gaps.setdefault(base, {})[key] = own
    cells = {}
    for family in gaps.values():
        tested = holm([stats.ttest_1samp(own, 0).pvalue for own in family.values()])
        for (key, own), p in zip(family.items(), tested, strict=True):
            mean, half = statistics.mean(own), half_width(own)
            text = f"{mean:.3g} ({mean - half:.3g} to {mean + half:.3g})"
            cells[key] = [text, f"{p:.2g}"]
    return cells


def of_tuning(path: Path, options: dict[str, str]) -> str:
    """The table of a tuning.json: the mean of each value over the tuning seeds, the chosen bold."""
    files = sorted(path.parents[1].glob(f"{path.parent.name}/{path.name}")) or [path]
    found = {}
    for file in files:
        if not (own := read_json(file)):
            raise UserError(f"{file} is missing or damaged")
        of = f" of {file.parent.name}" if len(files) > 1 else ""
        found |= {f"`{network}`{of}": facts for network, facts in own.items()}

    def named(values: dict[str, float]) -> str:
        return ", ".join(f"{value:g}" for value in values.values())

    tried = [each["values"] for network in found.values() for each in network["tried"]]
    points = {named(values): tuple(values.values()) for values in tried}
    columns = sorted(points, key=points.__getitem__)
    lines = []
    for name, network in found.items():
        cells = dict.fromkeys(columns, "")
        for each in network["tried"]:
            results = list(each["results"].values())
            text = "diverged" if None in results else f"{statistics.mean(results):.4g}"
            best = each["values"] == network["chosen"]
            cells[named(each["values"])] = f"**{text}**" if best else text
        lines.append([name, *cells.values()])
    return markdown_table([", ".join(tried[0]), *columns], lines)


def number_of(word: str) -> float:
    """The number that a word is, to sort by; 0 if it is none."""
    try:
        return float(word)
    except ValueError:
        return 0.0


def numbers(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    """The values of a column where it has one; raises UserError for words."""
    try:
        return [float(row[name]) for row in rows if row.get(name)]
    except ValueError as error:
        raise UserError(f"columns={name} are not numbers ({error}); use it in by=") from None


def chosen(option: str, options: dict[str, str], known: list[str]) -> list[str]:
    """The names that an option lists, all of them by default; raises UserError for unknown ones."""
    names = options[option].split(",") if option in options else known
    if wrong := [name for name in names if name not in known]:
        raise UserError(f"{option}={wrong[0]} is not in this table; use {', '.join(known)}")
    return names


def rewritten(readme: Path, name: str, changed: list[str]) -> str:
    """The text of a README, called `name`, with its tables and marked numbers made again.

    Adds a sentence to `changed` for each table and each line with numbers that differ. Raises
    UserError, which names the table or number, if it cannot be made or has no end.
    """

    def made(block: re.Match[str]) -> str:
        try:
            table = table_of(readme, block[1])
        except UserError as error:
            raise UserError(f"{name}, table {block[1]}: {error}") from error
        if table != block[2]:
            changed.append(f"{name}: the table {block[1]} differs from its folder")
        return f"{OPENS}{block[1]} -->\n{table}{CLOSES}"

    text = readme.read_text()
    if text.count(OPENS) != text.count(CLOSES) or len(BLOCK.findall(text)) != text.count(OPENS):
        raise UserError(f"{name}: a table does not end; write {CLOSES} below each {OPENS}... -->")
    tabled = BLOCK.sub(made, text)
    whole = written(readme, tabled)
    for old, new in zip(tabled.splitlines(), whole.splitlines(), strict=True):
        if old != new:
            changed.append(f"{name}: a number differs from its record in: {new}")
    return whole


def main(arguments: Sequence[str], root: Path = HERE) -> int:
    """Rewrites or checks pages below `root` and those that quote them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the tables of results in README.md files.")
    parser.add_argument("--check", action="store_true", help="only say which tables would change")
    check = parser.parse_args(arguments).check
    changed: list[str] = []
    collected.cache_clear()
    panels_of.cache_clear()
    quoting = [root.parent / name for name in QUOTING]
    for readme in [*sorted(root.rglob("README.md")), *filter(Path.is_file, quoting)]:
        try:
            text = rewritten(readme, readme.relative_to(root.parent).as_posix(), changed)
        except UserError as error:
            print(error, file=sys.stderr)
            return 1
        if not check and text != readme.read_text():
            readme.write_text(text)
    for sentence in changed if check else ():
        print(f"{sentence}; run python experiments/tables.py", file=sys.stderr)
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
