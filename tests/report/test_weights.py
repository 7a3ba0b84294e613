"""Metrics count only for the weights they were measured on; weights are read only if needed."""

import csv
import json
import os
import shutil

import pytest
import torch
from helpers.fake_runs import NAME, UNET, fake_group, fake_run
from helpers.refusals import refused

import diffusion_lab
from diffusion_lab.common import hashing
from diffusion_lab.metrics.quantity import with_fingerprint
from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import compare
from diffusion_lab.report.tables import ArmTable
from diffusion_lab.runs import checkpoints, current
from diffusion_lab.runs.folder import load_config, reopen
from diffusion_lab.runs.results import evaluations_of, save_evaluation
from diffusion_lab.runs.summary import load_summary

EXTRACTOR = {
    "extractor": "efficientnet_lite0-96",
    "extractor_fingerprint": "abc",
    "test": "x",
    "mirrored": False,
}


@pytest.fixture
def read(monkeypatch):
    """The list of checkpoints that were read, to hash them or to check them for damage."""
    read = []
    for module, name in ((hashing, "of_file"), (checkpoints, "fault")):
        original = getattr(module, name)

        def spied(path, original=original):
            read.append(path)
            return original(path)

        monkeypatch.setattr(module, name, spied)
    return read


@pytest.fixture
def evaluated(tmp_path):
    """A run with FID 100 at the end of training, and FID 50 in a later evaluation."""
    folder = fake_run(tmp_path / "run", 100.0)
    cfg = load_config(folder)
    save_evaluation(
        folder, {f"fid/{NAME}": 50.0}, load_summary(folder).protocol, cfg, current.identify(folder)
    )
    return folder


def test_weights_that_were_saved_while_they_were_read_are_not_measured(tmp_path):
    folder = fake_run(tmp_path / "run", 100.0)
    known = current.identify(folder)
    current.require_unchanged(folder, known)
    torch.save("the next", last(folder))
    with refused(folder):
        current.require_unchanged(folder, known)


def fids(folder):
    found = evaluations_of(folder, 0, current.CurrentWeights(folder))
    return [record["metrics"][f"fid/{NAME}"] for record in found]


def test_metrics_of_a_run_that_goes_on_are_of_earlier_weights(tmp_path):
    folder = fake_run(tmp_path / "run", 100.0)
    assert fids(folder) == [100.0]
    reopen(folder)
    assert fids(folder) == []


def last(folder):
    return folder / checkpoints.LAST


def test_no_weights_are_read_of_runs_that_were_measured_in_training_alone(tmp_path, read):
    fake_group(tmp_path, "dit", [100.0, 110.0])
    fake_group(tmp_path, "unet", [100.0, 120.0], config=UNET)
    assert len(collect([tmp_path]).arms) == 2
    assert read == []


def test_no_weights_are_read_that_have_not_changed_since_they_were_measured(evaluated, read):
    assert fids(evaluated) == [100, 50]
    assert read == []


def test_weights_that_were_copied_are_read_and_known(evaluated, tmp_path, read):
    copy = tmp_path / "copy"
    shutil.copytree(evaluated, copy, copy_function=shutil.copy)
    os.utime(last(copy), (1, 1))
    assert fids(copy) == [100, 50]
    assert set(read) == {last(copy)}


def test_metrics_of_weights_that_were_replaced_are_not_believed(evaluated, read):
    size = last(evaluated).stat().st_size
    other = {"state_dict": {}, "global_step": 100, "folder": str(evaluated)[::-1]}
    torch.save(other, last(evaluated))
    os.utime(last(evaluated), (1, 1))
    assert last(evaluated).stat().st_size == size
    assert fids(evaluated) == [100]


def test_an_evaluation_of_an_older_program_is_known_by_its_checksum(evaluated):
    (path,) = evaluated.glob("evaluations/*.json")
    record = json.loads(path.read_text())
    assert record.pop(current.STAMP) == current.file_stamp(evaluated)
    path.write_text(json.dumps(record))
    assert fids(evaluated) == [100, 50]
    path.write_text(json.dumps(record | {current.CHECKPOINT: "of other weights"}))
    assert fids(evaluated) == [100]


def test_of_a_damaged_checkpoint_the_one_before_it_is_looked_at(evaluated):
    previous = evaluated / checkpoints.PREVIOUS
    os.rename(last(evaluated), previous)
    last(evaluated).write_bytes(b"damaged")
    assert fids(evaluated) == [100, 50]
    previous.unlink()
    with refused(last(evaluated)):
        fids(evaluated)


def test_a_run_without_its_checkpoints_has_its_own_metrics_alone(evaluated):
    other = fake_run(evaluated.parent / "other", 110.0, config=UNET)
    for folder in (evaluated, other):
        last(folder).unlink()
    found = collect([evaluated.parent])
    assert sorted(found.values("fid").value) == [100, 110]
    assert [(fact.kind, fact.values["run"]) for fact in found.left_out] == [
        ("weights_gone", evaluated)
    ]


def report_on(folder, ratio, **changed):
    """Writes a report.json for a run, as `memorization` does, with `changed` entries."""
    cfg = load_config(folder)
    plain = {part: dict(cfg[part]) for part in ("sampler", "guidance")}
    report = {
        "protocol": with_fingerprint(EXTRACTOR | {"num_samples": 1000}),
        current.CHECKPOINT: current.sha256_of(folder),
        "sampling": plain | {"seed": 0},
        "neighbours": {"features": {"copy_ratio": ratio}, "pixels": {"copy_ratio": 7.0}},
    }
    (folder / "memorization").mkdir()
    report |= changed
    known = {key: value for key, value in report.items() if value is not None}
    (folder / "memorization/report.json").write_text(json.dumps(known))


def ratios(folder):
    """The runs' copy ratios, the titles of their columns, and the kinds of facts on omissions."""
    found = collect([folder])
    titles = [column.title for column in ArmTable(found).columns if "Copies" in column.title]
    return [*found.values("copy_ratio").value], titles, found.omitted


def test_copies_are_of_these_weights_and_this_sampling(tmp_path):
    folders = fake_group(tmp_path, "dit", [100.0, 101.0, 102.0, 103.0, 104.0])
    report_on(folders[0], 1.5)
    report_on(folders[1], 2.5)
    report_on(folders[2], 9.0, **{current.CHECKPOINT: "of other weights"})
    report_on(folders[3], 9.0, sampling={"seed": 1})
    report_on(folders[4], 9.0)
    last(folders[4]).unlink()
    values, titles, omitted = ratios(tmp_path)
    assert (values, titles) == ([1.5, 2.5], ["Copies", "Copies by pixels"])
    words = ("other weights", "another sampler", "checkpoints are gone")
    for fact, folder, reason in zip(omitted, folders[2:], words, strict=True):
        assert (fact.kind, fact.values["run"]) == ("report", folder)
        assert reason in str(fact)


def test_every_count_of_copies_of_these_weights_is_in_the_frame(tmp_path):
    folders = fake_group(tmp_path, "dit", [100.0, 101.0, 102.0])
    report_on(folders[0], 1.5)
    report_on(folders[1], 2.5, sampling={"seed": 1}, protocol=with_fingerprint({"test": "y"}))
    report_on(folders[2], 9.0, **{current.CHECKPOINT: "of other weights"})
    frame = diffusion_lab.results(tmp_path)
    found = frame[frame.metric == "copy_ratio"]
    assert [*zip(found.seed, found.sampling_seed, found.value, strict=True)] == [
        (0, 0, 1.5),
        (1, 1, 2.5),
    ]
    assert len({*found.fingerprint}) == len({*found.sampling}) == 2
    assert set(frame[frame.metric == "pixel_copy_ratio"].value) == {7.0}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_samples", 500, "num_samples is 1000 or 500"),
        ("extractor", "inception", "extractor is efficientnet_lite0-96 or inception"),
        ("test", "y", "test is x or y"),
        ("mirrored", True, "mirrored is False or True"),
    ],
)
def test_copies_that_were_counted_otherwise_are_not_compared(tmp_path, key, value, words):
    first, second = fake_group(tmp_path, "dit", [100.0, 101.0])
    report_on(first, 1.5)
    other = EXTRACTOR | {"num_samples": 1000} | {key: value}
    report_on(second, 2.5, protocol=with_fingerprint(other))
    values, titles, (fact,) = ratios(tmp_path)
    assert (values, titles, fact.kind) == ([], [], "reports_unequal")
    assert words in fact.values["differences"]


def rates(features: float, pixels: float) -> dict:
    return {"features": {"copies": features}, "pixels": {"copies": pixels}}


@pytest.mark.long
def test_what_the_controls_of_the_count_say_stands_beside_it(tmp_path):
    limits = {"features": {"copy_ratio_by_control": 11.0}, "pixels": {"copy_ratio_by_control": 8.0}}
    controls = {
        "positive": {"sigma_over_alpha": {"0.1": rates(0.72, 1.0), "0.3": rates(0.4, 0.9)}},
        "negative": {"neighbours": limits},
        "grain": {"grey_levels": {"5": rates(0.25, 1.0)}},
    }
    first, second = fake_group(tmp_path / "runs", "dit", [100.0, 101.0])
    report_on(first, 1.5, controls=controls)
    report_on(second, 2.5, controls={})
    result = compare([str(tmp_path / "runs")], str(tmp_path / "out"))
    (row,) = csv.DictReader((tmp_path / "out/table.csv").open())
    for name, value in (
        ("copy_ratio_by_control", 11),
        ("pixel_copy_ratio_by_control", 8),
        ("copies_found_at_0.1", 0.72),
        ("copies_found_at_0.3", 0.4),
        ("pixel_copies_found_at_0.1", 1),
        ("pixel_copies_found_at_0.3", 0.9),
    ):
        assert float(row[name]) == value
    assert "| 72.0 % | 40.0 % |" in (tmp_path / "out/table.md").read_text()
    runs = list(csv.DictReader((tmp_path / "out/runs.csv").open()))
    assert [run["copies_found_with_grain_5"] for run in runs] == ["0.25", ""]
    assert ratios(tmp_path / "runs")[1] == [
        "Copies",
        "Copies by pixels",
        "Copies, by control",
        "Copies found at 0.1",
        "Copies found at 0.3",
        "Copies by pixels, by control",
        "Copies found by pixels at 0.1",
        "Copies found by pixels at 0.3",
    ]
    assert set(result["verdict"]) == {"fid", "test_loss", "copy_ratio", "pixel_copy_ratio"}


def test_a_ratio_that_is_not_finite_is_none(tmp_path):
    first, second = fake_group(tmp_path, "dit", [100.0, 101.0])
    report_on(first, 1.5)
    report_on(second, float("inf"))
    found, titles, (fact,) = ratios(tmp_path)
    assert (found, titles) == ([1.5], ["Copies", "Copies by pixels"])
    assert fact.values == {"run": second, "metrics": ["copy_ratio"]}
