"""The table of the page about objectives is that of its raw data."""

import csv
import runpy

from helpers.paths import ROOT

FOLDER = ROOT / "experiments/objectives"


def test_the_table_of_the_page_is_made_of_its_results():
    page = runpy.run_path(str(FOLDER / "rise.py"))
    with (FOLDER / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = page["table"](rows).strip()
    assert len(table.splitlines()) == 7
    assert table in (FOLDER / "README.md").read_text()


def test_the_rise_is_the_difference_of_each_seed():
    rows = [
        {"objective": "x", "seed": seed, "steps": steps, "fid": fid}
        for seed, steps, fid in (
            ("0", "10", "5"),
            ("1", "10", "7"),
            ("0", "50", "6"),
            ("1", "50", "4"),
        )
    ]
    few, many, differences = runpy.run_path(str(FOLDER / "rise.py"))["rise"](rows, "x", "fid")
    assert (few, many, differences) == (6, 5, [1, -3])
