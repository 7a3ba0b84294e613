"""The tables of results in README.md files, made from published folders.

    python experiments/tables.py           # rewrites the tables
    python experiments/tables.py --check   # exits 1, and names each table that would change

A table stands between two comments, in any README.md below this folder:

    <!-- table published columns=fid,kid rows=UNet,DiT -->
    <!-- end of table -->

`published` is a folder that `diffusion-lab publish` wrote, relative to the README. Columns are
named as in the comparison's table.csv, rows by composition; without them all are shown. Names with
blanks need quotes: rows="DiT · width=64,UNet". Numbers in prose are not checked.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.analysis.comparison.comparing import collect
from diffusion_lab.analysis.comparison.table import FID_STD, SAMPLES_NOTE, CompositionTable
from diffusion_lab.common.formats import markdown_table
from diffusion_lab.common.messages import UserError

HERE = Path(__file__).parent
HEAD = 2  # columns before those of the comparison: composition and seeds
OPENS, CLOSES = "<!-- table ", "<!-- end of table -->"
BLOCK = re.compile(rf"^{OPENS}(.+?) -->\n(.*?)^{CLOSES}$", re.MULTILINE | re.DOTALL)
OPTIONS = ("columns", "rows")


def table_of(readme: Path, words: str) -> str:
    """The table that the words of a block ask for; raises UserError for wrong ones."""
    folder, *given = shlex.split(words)
    options = dict(each.partition("=")[::2] for each in given)
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise UserError(f"{unknown[0]} is not known in a table; use {' or '.join(OPTIONS)}")
    found = collect([readme.parent / folder])
    table = CompositionTable(found.groups, found.names)
    kinds = [column.kind for column in table.columns]
    shown = chosen("columns", options, kinds)
    head, *body = table.lines("composition", "seeds")
    places = [*range(HEAD), *(HEAD + kinds.index(kind) for kind in shown)]
    by_name = {line[0]: [line[place] for place in places] for line in body}
    lines = [by_name[name] for name in chosen("rows", options, list(by_name))]
    notes = [note for note in table.notes if note != SAMPLES_NOTE or FID_STD.kind in shown]
    text = markdown_table([head[place] for place in places], lines)
    return "\n".join([text, *notes, ""]) if notes else text


def chosen(option: str, options: dict[str, str], known: list[str]) -> list[str]:
    """The names that an option lists, all of them by default; raises UserError for unknown ones."""
    names = options[option].split(",") if option in options else known
    if wrong := [name for name in names if name not in known]:
        raise UserError(f"{option}={wrong[0]} is not in this table; use {', '.join(known)}")
    return names


def rewritten(readme: Path, name: str, changed: list[str]) -> str:
    """The text of a README, called `name`, with its tables made again.

    Adds a sentence to `changed` for each table that differs. Raises UserError, which names the
    table, if it cannot be made or has no end.
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
    return BLOCK.sub(made, text)


def main(arguments: Sequence[str], root: Path = HERE) -> int:
    """Rewrites or checks all tables below `root`; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the tables of results in README.md files.")
    parser.add_argument("--check", action="store_true", help="only say which tables would change")
    check = parser.parse_args(arguments).check
    changed: list[str] = []
    for readme in sorted(root.rglob("README.md")):
        try:
            text = rewritten(readme, readme.relative_to(root).as_posix(), changed)
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
