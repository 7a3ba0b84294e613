"""The benchmarks of training steps, which say how many images equal time allows."""

import runpy

import pytest
import torch
from helpers.paths import ROOT

SIZE = "backbone=dit backbone.width=32 backbone.heads=2 backbone.depth=1"


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function: printed("steps", ...) runs this benchmark -> the text that it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments, "--rounds", "2"])
        runpy.run_path(str(ROOT / f"experiments/benchmarks/{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def rows_of(text: str) -> list[list[str]]:
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("work", [[], ["--calls"]])
def test_steps_of_recipes_are_timed_in_turns(printed, work):
    sweep = f"{SIZE} batch_size=2 budget=none"
    out = printed("steps", "optimizer=adamw", "optimizer=muon", "--sweep", sweep, *work)
    first, second = rows_of(out)
    assert (first[1], second[1]) == ("`optimizer=adamw`", "`optimizer=muon`")
    assert first[3] == "1.000 (1.000 to 1.000)"
    assert float(second[4]) == pytest.approx(1 / float(second[3].split()[0]), rel=1e-2)


def test_watched_steps_are_timed_in_turns(printed):
    data = "data.source._target_=helpers.tiny_data.TinyData"
    out = printed("watching", f"{SIZE} batch_size=4 {data} trainer.accelerator=cpu")
    assert " ms for the loss by level" in out
    rows = rows_of(out)
    turns = ["plain", "loss by level", "statistics", "statistics and noise scale"]
    assert [row[2] for row in rows] == turns
    assert rows[0][4] == "1.000 (1.000 to 1.000)"
