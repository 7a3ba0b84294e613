"""The table of all options in conf/README.md repeats the first sentence of each option's file."""

import re
from collections.abc import Iterator
from pathlib import Path

from helpers.paths import CONF


def sentence_of(path: Path) -> str:
    """The first sentence of the comment at the top of a configuration file."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    text = " ".join(line.removeprefix("#").strip() for line in lines[:count])
    return re.split(r"(?<=[.?])(?= +[A-Z(]|$)", text)[0].removesuffix(".")


def tables() -> Iterator[str]:
    """Yields the lines of one table per group, in alphabetical order."""
    groups = sorted({path.parent for path in CONF.rglob("*/*.yaml")})
    for group in groups:
        yield f"## {group.relative_to(CONF)}\n"
        yield "| option | what it is |\n| --- | --- |"
        for path in sorted(group.glob("*.yaml")):
            yield f"| `{path.stem}` | {sentence_of(path)} |"
        yield ""


def test_every_option_has_its_line():
    written = (CONF / "README.md").read_text().partition("\n## ")
    expected = "\n".join(tables())
    assert "".join(written[1:]).strip().splitlines() == expected.strip().splitlines()


def test_no_option_is_without_a_word():
    assert [path for path in CONF.rglob("*.yaml") if len(sentence_of(path)) < 5] == []
