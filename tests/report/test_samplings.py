"""Runs that were sampled in several ways: each way is judged, and every metric is in a table."""

import csv

import pytest
from helpers.fake_runs import GUIDANCE, NAME, SAMPLER, STUDY_PROTOCOL, UNET, fake_run
from omegaconf import OmegaConf

from diffusion_lab.report.page import compare
from diffusion_lab.runs.current import identify
from diffusion_lab.runs.results import save_evaluation
from diffusion_lab.runs.summary import load_summary

ONE, TWO = [100.0, 104.0, 99.0], [150.0, 152.0, 157.0]
ACCURACY = "accuracy/classifier-3f01b756/1k"


def sampled(folder, fid: float, seed: int, config: dict, again: dict[int, float]) -> None:
    """Writes a run, and its FID and accuracy for other numbers of steps."""
    fake_run(folder, fid, seed, config, metrics={ACCURACY: 0.6 + seed / 100})
    for steps, other in again.items():
        way = {"sampler": SAMPLER | {"steps": steps}, "guidance": GUIDANCE, "seed": 0}
        metrics = {f"fid/{NAME}": other, f"fid_real/{NAME}": 96.3, ACCURACY: 0.8}
        protocol, weights = load_summary(folder).protocol, identify(folder)
        save_evaluation(folder, metrics, protocol, OmegaConf.create(way), weights)


def compared(root):
    """The text of the table and of the page of the runs in a folder."""
    compare([str(root / "runs")], str(root / "out"))
    return (root / "out/table.md").read_text(), (root / "out/index.html").read_text()


@pytest.fixture
def two_ways(tmp_path):
    """Runs in 10 steps, and in 50, in which the U-Net is ahead."""
    for name, config, fids in (("dit", {}, ONE), ("unet", UNET, TWO)):
        for seed, fid in enumerate(fids):
            sampled(tmp_path / f"runs/{name}{seed}", fid, seed, config, {50: 300.0 - fid})
    return tmp_path


def test_each_is_judged_by_itself_and_every_metric_and_run_is_listed(two_ways):
    text, page = compared(two_ways)
    for said in (text, page):
        assert "With sampler.steps=50: UNet is better than DiT: FID 147" in said
    head, _, *rows = text[text.index("With sampler.steps=50:") :].splitlines()[2:]
    assert head == "| composition | seeds | FID | Accuracy |"  # a loss depends on no sampler
    cells = [[cell.split(" (")[0] for cell in row.strip("| ").split(" | ")] for row in rows[:2]]
    assert cells == [["DiT", "3", "199", "80.0 %"], ["UNet", "3", "147", "80.0 %"]]
    assert page.count(">With sampler.steps=50</caption>") == 1
    rows = list(csv.DictReader((two_ways / "out/samplings.csv").open()))
    assert len(rows) == 12
    assert [*rows[0]] == [
        *("composition", "sampling", "seed", "fid", "fid_real", "accuracy", "accuracy_real")
    ]
    assert [*rows[-1].values()] == ["UNet", "sampler.steps=50", "2", "143.0", "96.3", "0.8", ""]


def test_one_run_alone_is_no_sampling_of_all(two_ways):
    compared(two_ways)
    for path in (two_ways / "runs/dit0/evaluations").iterdir():
        path.unlink()
    assert "steps=50" not in "".join(compared(two_ways))
    assert not (two_ways / "out/samplings.csv").exists()


def test_the_seeds_of_a_protocol_decide_for_each(tmp_path):
    """A fourth seed, which the protocol does not name, is far off, and counts in no test of FID."""
    for name, config, fids in (("dit", {}, ONE), ("unet", UNET, TWO)):
        for seed, fid in enumerate([*fids, 10 * fids[0]]):
            own = config | {"protocol": STUDY_PROTOCOL}
            sampled(tmp_path / f"runs/{name}{seed}", fid, seed, own, {50: fid + 1})
    text, _ = compared(tmp_path)
    for start in ("\n", "With sampler.steps=50: "):
        assert f"{start}DiT is better than UNet: FID 10" in text
