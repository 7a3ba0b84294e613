"""Tables of a comparison and the frame behind them."""

import csv
import json
import subprocess
import sys

import pytest
from helpers.fake_runs import NAME, UNET, fake_group, fake_run

import diffusion_lab
from diffusion_lab.common.formats import amount, with_spread
from diffusion_lab.report.frame import COLUMNS, collect
from diffusion_lab.report.page import compare
from diffusion_lab.report.tables import NONE, RANGE_NOTE, ArmTable, column_of
from diffusion_lab.report.words import digits


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def written(tmp_path, name: str) -> list[dict]:
    compare([str(tmp_path / "runs")], str(tmp_path / "out"))
    return list(csv.DictReader((tmp_path / "out" / name).open()))


def test_every_number_of_ones_runs_is_a_row_of_a_frame(runs):
    fake_group(runs, "dit", [100.0, 110.0])
    fake_group(runs, "unet", [90.0, 95.0], config=UNET)
    frame = diffusion_lab.results(runs)
    assert list(frame.columns) == COLUMNS
    fid = frame[(frame.metric == "fid") & frame.at_end]
    assert fid.groupby("arm").value.mean().to_dict() == {"DiT": 105, "UNet": 92.5}
    (row,) = fid[fid.value == 110].itertuples()
    assert (row.seed, row.sampling_seed, row.protocol) == (1, 0, NAME)
    assert (row.images, row.seconds) == (6400, 120.0)
    assert row.flops == 6 * 2_000_000 * 6400
    assert "DPMSolver with 10 steps" in row.sampling
    assert set(frame[frame.metric == "macs"].value) == {2e6}


def test_the_frame_has_what_was_measured_on_the_way(runs):
    levels = {"val_by_level/t0.05": 0.3, "val_by_level/t0.15": 0.2}
    folder = fake_run(runs / "a", 100.0, metrics=levels)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "images": 3840, "seconds": 60.0, **levels}) + "\n")
    frame = diffusion_lab.results(runs)
    before = frame[~frame.at_end]
    found = {(row.metric, row.protocol, row.images): row.value for row in before.itertuples()}
    assert found == {
        ("fid", NAME, 3200): 150.0,
        ("fid", NAME, 6400): 100.0,
        ("val_by_level", "t0.05", 3840): 0.3,
        ("val_by_level", "t0.15", 3840): 0.2,
    }


@pytest.mark.long
def test_reading_runs_imports_neither_torch_nor_lightning(runs, tmp_path):
    fake_group(runs, "dit", [100.0, 110.0, 105.0])
    fake_group(runs, "unet", [90.0, 95.0, 91.0], config=UNET)
    for checkpoint in runs.rglob("*.ckpt"):  # published runs have none
        checkpoint.unlink()
    program = (
        "import sys; from diffusion_lab.report.page import compare; "
        f"compare([{str(runs)!r}], {str(tmp_path / 'out')!r}); "
        "sys.exit(len({'torch', 'lightning', 'wandb'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/plots/fid_gaps.svg").exists()


def test_means_intervals_costs_and_real_values_of_runs_that_are_written_too(runs, tmp_path):
    accuracy = "accuracy/classifier-3f01b756/1k"
    for seed, fid in enumerate((100.0, 110.0, 90.0)):
        fake_run(runs / str(seed), fid, seed, metrics={accuracy: 0.7 + seed / 8})
    (row,) = written(tmp_path, "table.csv")
    assert (row["composition"], row["seeds"]) == ("all runs", "3")
    assert float(row["fid"]) == 100
    # standard deviation 10, times t(2) / sqrt(3)
    assert float(row["fid_low"]) == pytest.approx(100 - 24.8414, abs=1e-3)
    assert float(row["fid_high"]) == pytest.approx(100 + 24.8414, abs=1e-3)
    assert float(row["fid_real"]) == 96.3
    assert float(row["macs"]) == 2e6
    assert float(row["images_per_second"]) == 375  # median of 350 and 400
    assert float(row["peak_memory"]) == 2**30
    assert float(row["fid_std"]) == 3
    assert row["classifier"] == "classifier-3f01b756"
    rows = list(csv.DictReader((tmp_path / "out/runs.csv").open()))
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert [row["folder"] for row in rows] == [str(runs / str(seed)) for seed in range(3)]
    # by the whole names of their metrics
    assert [float(row[f"fid/{NAME}"]) for row in rows] == [100, 110, 90]
    assert [float(row[f"fid_std/{NAME}"]) for row in rows] == [3, 3, 3]
    assert [float(row[accuracy]) for row in rows] == [0.7, 0.825, 0.95]
    assert [float(row["training_seconds"]) for row in rows] == [120, 120, 120]


def test_two_or_three_runs_have_their_range_and_more_an_interval(runs):
    fake_group(runs, "dit", [100.0, 110.0, 90.0])
    fake_group(runs, "unet", [100.0, 110.0, 90.0, 100.0], config=UNET)
    found = collect([runs])
    table = ArmTable(found)
    column = next(each for each in table.columns if each.kind == "fid")
    cells = {arm.name: str(table.cell(arm, column)) for arm in found.arms}
    assert cells == {"DiT": "100 (90 to 110)", "UNet": "100.0 ± 13.0"}
    assert len(table.notes) == 2
    plain = ArmTable(found, ranges=False)
    assert str(plain.cell(found.arms[0], column)).startswith("100.0 ± ")
    assert str(column.of([5.0])) == "5"
    accuracy = column_of(found.metrics["accuracy"])
    assert str(accuracy.of([0.5, 0.7], ranges=True)) == "60.0 % (50.0 to 70.0)"
    assert str(table.real(column)) == "96.3"
    assert table.lines("a", "b")[-1][0] == "real images"
    assert str(table.real(accuracy)) == NONE
    kinds = [each.kind for each in ArmTable(found, without=["macs"]).columns]
    assert "macs" not in kinds  # left out on request
    assert "parameters" in kinds


def test_the_notes_are_on_the_runs_that_have_a_value(runs):
    for seed, fid in enumerate((100.0, 110.0, 90.0, float("nan"))):
        fake_run(runs / str(seed), fid, seed, metrics={"test/loss": float("nan")})
    assert ArmTable(collect([runs])).notes == [RANGE_NOTE]


def test_older_runs_have_no_macs_and_no_memory(runs, tmp_path):
    fake_run(runs / "a", 100.0, summary={"macs": None, "peak_memory_bytes": None})
    fake_run(runs / "b", 101.0, config=UNET)
    row, other = written(tmp_path, "table.csv")
    assert (row["macs"], row["peak_memory"]) == ("", "")
    assert "classifier" not in row
    assert float(other["macs"]) == 2e6


def test_every_pair_is_written_and_only_the_primary_metric_has_p(runs, tmp_path):
    # UNet is ahead by recall and behind by FID
    for name, config, fids, recalls in (
        ("dit", {}, [100.0, 110.0, 90.0], [0.5, 0.51, 0.5]),
        ("unet", UNET, [150.0, 162.0, 144.0], [0.6, 0.62, 0.6]),
    ):
        for seed, (fid, recall) in enumerate(zip(fids, recalls, strict=True)):
            more = {f"recall/{NAME}": recall}
            fake_run(runs / f"{name}{seed}", fid, seed, config, metrics=more)
    fid, recall, _ = written(tmp_path, "pairs.csv")
    assert (fid["ahead"], fid["behind"], fid["seeds"]) == ("DiT", "UNet", "0 1 2")
    assert (float(fid["gap"]), fid["significant"]) == (52, "True")
    assert (float(fid["better"]), fid["pairs"]) == (9, "9")
    assert float(fid["least"]) <= float(fid["low"]) < 52 < float(fid["high"])
    assert (recall["metric"], recall["ahead"]) == ("recall", "UNet")
    assert recall["p"] == recall["corrected"] == recall["significant"] == ""
    assert float(recall["low"]) < float(recall["gap"]) < 0


def test_latex_is_escaped(runs, tmp_path):
    fake_group(runs, "a", [1.0, 2.0, 3.0, 4.0], config={"backbone": {"mlp_ratio": 4}})
    fake_group(runs, "b", [1.0, 2.0], config={"backbone": {"mlp_ratio": 2}})
    compare([str(runs)], str(tmp_path / "out"))
    text = (tmp_path / "out/table.tex").read_text()
    assert r"mlp\_ratio=4 & 4 &" in text
    assert r"$\pm$" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    widths = {line.count("&") for line in text.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 1


def test_both_numbers_have_the_digits_of_the_spread():
    assert with_spread(468.83, 44.24) == ("468.8", "44.2")
    assert with_spread(0.24691, 0.00421) == ("0.2469", "0.0042")
    assert with_spread(3.0, 0.0) == ("3", "0")


def test_numbers_are_rounded_before_their_unit_and_their_form_are_chosen():
    assert list(map(amount, (999_936, 999_400, 999.6, 1e12))) == ["1M", "999k", "1k", "1T"]
    assert [digits(value, 1) for value in (9.4, 9.6, 64.2)] == ["9", "10", "64"]
    assert list(map(digits, (99.4, 99.6, 0.012))) == ["99", "100", "0.012"]
