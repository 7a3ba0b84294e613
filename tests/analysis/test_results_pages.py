"""Pages of results have one order, are short, and take their answers from records."""

import re

import pytest
import stated
from helpers.pages import EXPERIMENTS, PAGES
from helpers.paths import ROOT

TELLS = [page for page in EXPERIMENTS if "\n## How sure?\n" in page.read_text()]
FOLDED = re.compile(r"<details.*?</details>", re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


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
