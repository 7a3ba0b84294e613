"""Pages of results have one order, are short, and take their answers from records.

Figures that pages quote from experiments/ are those of the linked README.md files; a wrong figure
that happens to be another one of the linked page is not found.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import stated
from helpers.pages import EXPERIMENTS, PAGES
from helpers.paths import CONF, ROOT

TELLS = [page for page in EXPERIMENTS if "\n## How sure?\n" in page.read_text()]
FOLDED = re.compile(r"<details.*?</details>", re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
Figure = list[tuple[float, float]]  # values, each with half of a unit in its last place

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
FIGURE = re.compile(rf"(?<![\w.,])({NUMBER})(?: ± ({NUMBER}))?(?: ?(k|M|GMACs)\b)?(?!\w|[.,]\d)")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "GMACs": 1e9}
NOT_FIGURES = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|\*\*|^##.*?$", re.DOTALL | re.MULTILINE)
SOURCE = re.compile(r"experiments/(\w+)(?:/README\.md|\b(?![/\w]|\.\w))")
PARAGRAPH, SECTION = r"\n\n|\n(?=\|)", r"^## "
BY_SECTION = ("metrics.md", "results.md", "scale.md", "watching.md")  # links stand below tables


def count(text) -> int:
    """The words of a text, without the bars of tables and lone signs."""
    return len(re.findall(r"\S*\w\S*", text))


def seen(page) -> str:
    """The text that a reader sees without unfolding."""
    return COMMENT.sub("", FOLDED.sub("", page.read_text()))


@pytest.mark.parametrize("page", TELLS, ids=lambda page: page.parent.name)
def test_a_page_of_results_has_one_order_and_is_short(page):
    text = seen(page)
    title, answer, *_ = text.split("\n\n")
    assert title.endswith("?")
    assert answer.startswith("**")
    assert answer.endswith("**")
    assert count(text) <= 600
    assert re.findall("^## (.+)", text, re.MULTILINE) == ["How sure?", "What this does not show"]
    sure, limits = re.split("^## .+", text, flags=re.MULTILINE)[1:]
    assert sure.count("\n* ") <= 3
    assert limits.count("\n* ") <= 4
    assert all(row.count("|") <= 7 for row in text.splitlines())  # six columns


def test_experiments_with_a_published_folder_tell_their_results_in_this_order():
    published = {path.parent for path in (ROOT / "experiments").glob("*/published*")}
    assert published <= {page.parent for page in TELLS}


RECORDED = [p for p in TELLS if {*p.parent.glob("published*"), *p.parent.glob("results.csv")}]


@pytest.mark.parametrize("page", RECORDED, ids=lambda page: page.parent.name)
def test_the_answer_is_written_from_records(page):
    assert stated.MARK.search(page.read_text().split("\n\n")[1])


def test_the_overviews_are_short():
    assert count(seen(PAGES / "results.md")) <= 2000
    results = re.search(r"\n## Results\n(.+?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    findings = re.findall(r"^\* .+", results, re.MULTILINE)
    assert 0 < len(findings) <= 8
    assert results.count("](experiments/results_") == 4
    assert "\n| " not in results


def figures(text: str) -> dict[str, Figure]:
    """The numbers of a text, `a ± b` as one, without signs, code and lone digits."""

    def values(words: Sequence[str], unit: float) -> Figure:
        plain = [word.replace(",", "") for word in words if word]
        return [(float(w) * unit, unit / 2 * 10.0 ** -len(w.partition(".")[2])) for w in plain]

    found = FIGURE.finditer(NOT_FIGURES.sub(" ", COMMENT.sub("", text)))
    return {
        each[0]: values(each.group(1, 2), UNITS[each[3] or ""]) for each in found if each[0][1:]
    }


def untrue(text: str) -> list[str]:
    """The figures of a text that no figure of a page which it names rounds to."""
    pages = [ROOT / "experiments" / name / "README.md" for name in SOURCE.findall(text)]
    known = [figure for page in pages for figure in figures(page.read_text()).values()]
    known += [[each] for figure in known for each in figure if len(figure) > 1]

    def rounds_to(quoted: Figure, own: Figure) -> bool:
        return len(quoted) == len(own) and all(
            abs(a - b) <= half * (1 + 1e-6) for (a, half), (b, _) in zip(quoted, own, strict=True)
        )

    return [
        word
        for word, quoted in figures(text).items()
        if pages and not any(rounds_to(quoted, own) for own in known)
    ]


def quotes(path: Path) -> list[str]:
    """The parts of a file that quote the pages which they name."""
    text = COMMENT.sub("", path.read_text())
    if path.suffix == ".yaml":
        return re.findall(r"Result: .*?(?=^\w|\Z)", text, re.DOTALL | re.MULTILINE)
    return re.split(SECTION if path.name in BY_SECTION else PARAGRAPH, text, flags=re.MULTILINE)


FILES = [ROOT / "README.md", *sorted(PAGES.glob("*.md")), *sorted(CONF.rglob("*.yaml"))]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if any(SOURCE.search(part) for part in quotes(path))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_quoted_figures_are_those_of_the_page_that_they_come_from(path):
    assert [word for part in quotes(path) for word in untrue(part)] == []


@pytest.mark.parametrize(
    ("quoted", "changed"),
    [
        ("105.3 ± 5.8", "105.2 ± 5.8"),
        ("105.3 ± 5.8", "105.3 ± 5.7"),
        ("86.8 ± 0.3 %", "86.9 ± 0.3 %"),
        ("45 to 89", "46 to 89"),
        ("277 M", "278 M"),
    ],
)
def test_a_changed_figure_is_found(quoted, changed):
    parts = [part for part in quotes(PAGES / "results.md") if quoted in part]
    assert [untrue(part) for part in parts] == [[]]
    found = untrue(parts[0].replace(quoted, changed))
    assert len(found) == 1
    assert found[0] in changed


def test_figures_are_compared_by_their_last_place():
    assert figures(
        "**84.60 ± 0.16 %** of 57.6k at 0.28 GMACs, 1 `x=12`, [two](a/32.md), -0.25."
    ) == {
        "84.60 ± 0.16": [(84.6, 0.005), (0.16, 0.005)],
        "57.6k": [(57600, 50)],
        "0.28 GMACs": [(0.28e9, 0.005e9)],
        "0.25": [(0.25, 0.005)],
    }
