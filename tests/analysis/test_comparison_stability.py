"""Gradients that spiked in training are a reservation of a comparison."""

import json
from pathlib import Path

import pytest
from helpers.fake_runs import UNET, fake_group, said

from diffusion_lab.analysis.comparison.candidates import spike_in

FIDS = [100.0, 101.0, 99.0]


def logged(norms: list[tuple[float, float]]) -> list[dict]:
    """Rows with means and maxima of gradient norms, and one of a validation in between."""
    rows: list[dict] = [
        {"step": 50 * place, "train/grad_norm": mean, "train/grad_norm_max": largest}
        for place, (mean, largest) in enumerate(norms, 1)
    ]
    return [*rows[:1], {"step": 50, "val/loss": 0.3}, *rows[1:]]


@pytest.mark.parametrize(
    ("norms", "spike"),
    [
        ([(2.0, 90.0)] + [(0.5, 1.0)] * 19, 2),  # large only as training begins
        ([(0.5, 1.0)] * 19 + [(0.7, 20.0)], 40),
        ([(0.0, 0.0)] * 20, 0),
        ([], 0),
    ],
)
def test_a_spike_is_measured_by_the_median_after_the_beginning(norms, spike):
    assert spike_in(logged(norms) if norms else [{"step": 1, "train/loss": 0.1}]) == spike


def log(runs: list[Path], largest: float) -> None:
    """Gives runs calm gradients of 0.5, and one that is as large as said."""
    for run in runs:
        rows = logged([(0.5, 0.6)] * 10 + [(0.5, largest)])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + text)


def test_a_group_whose_gradients_spiked_is_named_with_its_worst_run(tmp_path):
    dits = fake_group(tmp_path, "dit", FIDS)
    log(dits[:1], 21.0)
    log(dits[1:2], 100.0)
    log(dits[2:], 19.0)  # 38 times
    log(fake_group(tmp_path, "unet", FIDS, config=UNET), 3.0)
    text = said(tmp_path)[1]
    assert text.count("spiked") == 1
    assert "in 2 of 3 runs of DiT, to 200 times" in text
