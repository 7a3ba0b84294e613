"""The speedrun's table: the gap of a trial, and which trials are records."""

import csv
import runpy
import sys

import pytest
from helpers.paths import ROOT
from scipy import stats

SPEEDRUN = runpy.run_path(str(ROOT / "experiments/speedrun/speedrun.py"))


def row(name, fids, seeds=None):
    seeds = range(len(fids)) if seeds is None else seeds
    runs = [
        {
            "metrics": {"fid_real/net/val5k-1k": 1.0, "fid/net/val5k-1k": fid, "kid/net/val": 0.1},
            "images_seen": 1000,
            "threads": 2,
            "device": "a CPU",
            "git_commit": None,
        }
        for fid in fids
    ]
    return SPEEDRUN["row_of"](name, "a change", ["a=1", "b=2"], list(seeds), runs)


def test_the_gap_is_that_of_a_paired_test():
    own, other = [190.0, 197.0, 188.0], [201.0, 205.5, 203.5]
    mean, half = SPEEDRUN["gap"](row("own", own), row("other", other))
    low, high = stats.ttest_rel(own, other).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert SPEEDRUN["gap"](row("own", own[:1]), row("other", other)) == (-11.0, None)


def test_a_trial_without_a_common_seed_is_refused_before_it_is_trained(monkeypatch, tmp_path):
    table = tmp_path / "trials.csv"
    first = SPEEDRUN["added"]([], row("first", [240.0, 242.0, 244.0]), None)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, SPEEDRUN["COLUMNS"])
        writer.writeheader()
        writer.writerows(first)
    before = table.read_text()
    monkeypatch.setattr(
        sys, "argv", ["speedrun.py", "new", "other seeds", "--seeds", "7", "--table", str(table)]
    )
    monkeypatch.setitem(SPEEDRUN["main"].__globals__, "trial", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="has seeds 0 1 2"):
        SPEEDRUN["main"]()
    assert table.read_text() == before


def test_a_record_has_three_seeds_and_beats_every_record_before_it():
    rows = []
    for name, fids in [
        ("first", [240.0, 242.0, 244.0]),
        ("tried", [100.0]),
        ("worse", [250.0, 250.0, 250.0]),
        ("better", [200.0, 202.0, 204.0]),
    ]:
        rows = SPEEDRUN["added"](rows, row(name, fids), None)
    assert [each["name"] for each in rows if each["record"]] == ["first", "better"]
    assert [each.get("against") for each in rows] == [None, "first", "first", "first"]
    assert rows[3]["gap"] == "-40.0"
    assert rows[3]["overrides"] == "a=1 b=2"

    rows = SPEEDRUN["added"](rows, row("tried", [190.0, 190.0, 190.0]), "worse")
    assert [each["name"] for each in rows] == ["first", "worse", "better", "tried"]
    assert (rows[-1]["record"], rows[-1]["against"], rows[-1]["gap"]) == ("yes", "worse", "-60.0")
    with pytest.raises(SystemExit):
        SPEEDRUN["added"](rows, row("new", [1.0, 1.0, 1.0]), "unknown")
