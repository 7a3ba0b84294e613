"""The benchmark of training steps, which says how many images equal time allows."""

import runpy

import pytest
import torch
from helpers.paths import ROOT


@pytest.mark.parametrize("work", [[], ["--calls"]])
def test_steps_of_recipes_are_timed_in_turns(monkeypatch, capsys, work):
    recipes = ["optimizer=adamw", "optimizer=muon"]
    size = "backbone=dit backbone.width=32 backbone.heads=2 backbone.depth=1 batch_size=2"
    given = ["steps.py", *recipes, "--sweep", f"{size} budget=none", "--rounds", "2", *work]
    monkeypatch.setattr("sys.argv", given)
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(ROOT / "experiments/benchmarks/steps.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    first, second = (dict(enumerate(map(str.strip, row.split("|")))) for row in rows)
    assert (first[1], second[1]) == ("`optimizer=adamw`", "`optimizer=muon`")
    assert first[3] == "1.000 (1.000 to 1.000)"
    assert float(second[4]) == pytest.approx(1 / float(second[3].split()[0]), rel=1e-2)


def test_watched_steps_are_timed_in_turns(monkeypatch, capsys):
    recipe = "backbone=dit backbone.width=32 backbone.heads=2 backbone.depth=1 batch_size=4"
    recipe += " data.source._target_=helpers.tiny_data.TinyData trainer.accelerator=cpu"
    monkeypatch.setattr("sys.argv", ["watching.py", recipe, "--rounds", "2"])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(ROOT / "experiments/benchmarks/watching.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert " ms for the loss by level" in out
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| `")]
    turns = ["plain", "loss by level", "statistics", "statistics and noise scale"]
    assert [row[2].strip() for row in rows] == turns
    assert rows[0][4].strip() == "1.000 (1.000 to 1.000)"
