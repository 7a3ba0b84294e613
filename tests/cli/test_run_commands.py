"""Commands on a trained run: sweeps over sampling, likelihood, encoding, inpainting."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import assert_names
from helpers.tiny_data import TinyData
from helpers.tiny_runs import QUICK, TINY, tiny_classifier
from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab.analysis import on_test_images
from diffusion_lab.analysis.evaluate import written
from diffusion_lab.analysis.on_test_images import REGIONS, known_in, missing
from diffusion_lab.cli.commands import expand, gather
from diffusion_lab.common.files import read_rows
from diffusion_lab.common.hashing import of_file
from diffusion_lab.first_stage.autoencoder.base import pad_to_multiple
from diffusion_lab.metrics.quantity import Quantity
from diffusion_lab.runs import checkpoints

SWEEP = ["sample-sweep", "run=run", "sampler=ddim,heun", "steps=2,3", "batch_size=16"]


def test_values_separated_by_commas_are_gathered_and_expanded():
    combined = "combinations=['sampler=ddim,heun','guidance.scale=1,2.5']"
    arguments = ["run=x", "sampler=ddim,heun", "seed=1", "guidance.scale=1,2.5"]
    assert gather(arguments) == ["run=x", "seed=1", combined]
    assert expand(["sampler=ddim,heun", "guidance.scale=1,2.5"]) == [
        {"sampler": "ddim", "guidance.scale": "1"},
        {"sampler": "ddim", "guidance.scale": "2.5"},
        {"sampler": "heun", "guidance.scale": "1"},
        {"sampler": "heun", "guidance.scale": "2.5"},
    ]
    assert gather(["run=x", "labels=[1,2]"]) == ["run=x", "labels=[1,2]"]
    assert expand([]) == [{}]


def test_of_several_overrides_of_a_key_the_last_one_counts():
    assert gather(["steps=10,20", "seed=1", "steps=20"]) == ["seed=1", "steps=20"]
    assert gather(["steps=5,6", "steps=10,20"]) == ["combinations=['steps=10,20']"]
    assert gather(["steps=5", "steps=10,20"])[-1] == "combinations=['steps=10,20']"


@pytest.mark.long
def test_images_in_a_file_are_a_reference_as_training_images_are(lab, run_folder):
    pixels = TinyData().load()[0].images.permute(0, 2, 3, 1)
    np.savez("reference.npz", images=pixels.numpy())
    measure = ["evaluate", "run=run", "device=cpu", "metrics.mmd=true"]
    found = []
    for wanted in (
        ["metrics.reference_size=null", "metrics.fld=true"],
        ["metrics.reference_size=null", "metrics.reference=reference.npz"],
    ):
        values = lab.result(*measure, *wanted)
        assert any("/train84-" in name for name in values) == ("metrics.fld=true" in wanted)
        found.append({name.partition("/")[0]: value for name, value in values.items()})
    assert math.isfinite(found[0].pop("fld"))
    assert {"fid", "kid", "mmd", "mmd_real", "coverage"} <= found[0].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_sweep_measures_each_combination_once(lab, run_folder):
    code, out, err = lab(*SWEEP, "json=true")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    calls = {(row["sampler"], row["steps"]): row["calls"] for row in result["rows"]}
    assert calls == {("ddim", "2"): 2, ("ddim", "3"): 3, ("heun", "2"): 3, ("heun", "3"): 5}
    assert [row["calls"] for row in result["rows"]] == sorted(calls.values())
    folder = run_folder / "sweeps/efficientnet_lite0-96_train64-16"
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["fid"]) for row in table] == [row["fid"] for row in result["rows"]]
    assert "best for its budget" in (folder / "table.md").read_text()
    with Image.open(folder / "fid.png") as picture:
        assert picture.size[0] > 400
    assert "sampler=ddim steps=2" in err  # the best for its budget

    # results are kept, even after a kill in the middle of a line
    rows = folder / "results.jsonl"
    rows.write_text(rows.read_text()[:-40])
    assert lab.result(*SWEEP)["rows"] == result["rows"]
    assert len(read_rows(rows)) == 4


@pytest.mark.long
def test_a_sweep_gives_the_metrics_of_evaluate(lab, run_folder):
    expected = lab.result("evaluate", "run=run", "sampler=heun", "sampler.steps=3", "batch_size=16")
    asked = ["sample-sweep", "run=run", "steps=3", "batch_size=16"]
    (row,) = lab.result(*asked, "sampler=heun")["rows"]
    assert row["fid"] == pytest.approx(expected[f"fid/{row['protocol']}"], rel=1e-6)
    # a sweep that varies other keys recognises the setting and reuses its result
    rows = lab.result(*asked, "sampler=euler,heun")["rows"]
    assert len(read_rows(next(run_folder.glob("sweeps/*/results.jsonl")))) == 2
    assert {row["sampler"]: row["fid"] for row in rows}["heun"] == row["fid"]
    # another setting of the metrics does not
    (other,) = lab.result(*asked, "sampler=heun", "metrics.half_splits=0")["rows"]
    assert "fid_infinity" not in other


def test_values_that_real_images_or_some_samples_lack_are_written(tmp_path):
    own = Quantity("mine", "Mine", "a metric of one's own", True)
    facts = {"protocol": "p", "classifier": None, "sampling": {}}
    first = {"guidance.scale": "1", "calls": 2.0, "fid": 3.0, "fid_real": 1.0, "fld": 7.0}
    second = {"guidance.scale": "2", "calls": 4.0, "fid": 2.0, "fid_real": 1.0, "mine": 5.0}
    rows = [facts | first | {"checkpoint": "a"}, facts | second | {"checkpoint": "b"}]
    written(tmp_path, rows, ["guidance.scale"], [own])
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["fld"], row["mine"], row["fid_real"]) for row in table] == [
        ("7.0", "", "1.0"),
        ("", "5.0", "1.0"),
    ]
    assert [row["checkpoint"] for row in table] == ["a", "b"]
    with Image.open(tmp_path / "scale.png") as picture:
        assert picture.size[0] > 1000  # two panels


@pytest.mark.long
def test_a_sweep_over_steps_names_the_checkpoint_of_each(lab, run_folder):
    first, last = checkpoints.file_of(run_folder, 1), run_folder / "checkpoints/last.ckpt"
    first.write_bytes(last.read_bytes() + b"more")
    asked = ["sample-sweep", "run=run", "step=1,null", "steps=2", "batch_size=16"]
    named = {row["step"]: row["checkpoint"] for row in lab.result(*asked)["rows"]}
    assert named == {"1": of_file(first), "null": of_file(last)}
    (rows,) = run_folder.glob("sweeps/*/results.jsonl")
    rows.write_text(rows.read_text().replace(of_file(last), of_file(first)))  # as rows once had it
    assert {row["step"]: row["checkpoint"] for row in lab.result(*asked)["rows"]} == named


def test_a_place_that_is_no_folder_is_refused_before_anything_is_measured(
    refusal, run_folder, monkeypatch
):
    Path("file").touch()
    monkeypatch.setattr("diffusion_lab.analysis.evaluate.measure", None)
    assert_names(refusal("sample-sweep", "run=run", "steps=2,3", "output=file"), "output=file")
    for command in ("sample", "encode", "inpaint"):
        assert_names(refusal(command, "run=run", "output=."), "output=.")


@pytest.mark.slow
def test_a_tolerance_that_is_not_met_ends_neither_a_training_nor_a_sweep(lab, run_folder):
    few = ["sampler=runge_kutta", "sampler.steps=2", "sampler.tolerance=1e-9"]
    lab.done("train", *TINY, *few, "run_dir=few")
    summary = json.loads(Path("few/summary.json").read_text())
    assert summary["finished"]
    assert not any(name.startswith("fid") for name in summary["metrics"])
    asked = ["sampler=runge_kutta", "sampler.tolerance=0.5", "steps=2,200", "batch_size=16"]
    (row,) = lab.result("sample-sweep", "run=run", *asked)["rows"]
    assert row["steps"] == "200"


@pytest.mark.slow
def test_guidance_and_autoguidance_cost_their_calls(lab, run_folder):
    lab.done("train", *TINY, "backbone.width=16", "run_dir=weak")
    arguments = ["sample-sweep", "run=run", "steps=2", "batch_size=16"]
    classifier_free = ["guidance=classifier_free", "guidance.scale=0,1,2"]
    weak = ["guidance=autoguidance", "guidance.weak_run=weak", "guidance.scale=1,2"]
    rows, auto = (
        {row["guidance.scale"]: row for row in lab.result(*arguments, *asked)["rows"]}
        for asked in (classifier_free, weak)
    )
    assert {scale: row["calls"] for scale, row in rows.items()} == {"0": 2, "1": 2, "2": 4}
    assert auto["2"]["calls"] == 4
    assert auto["1"]["fid"] == pytest.approx(rows["1"]["fid"], rel=1e-9)
    assert auto["2"]["fid"] != pytest.approx(rows["2"]["fid"], rel=1e-6)


@pytest.mark.slow
def test_a_sweep_over_the_scale_has_accuracy_and_a_plot_of_it(lab, run_folder):
    file = tiny_classifier(run_folder / "classifier.safetensors")
    asked = ["run=run", "steps=2", "guidance=classifier_free", "guidance.scale=3,0"]
    lab.done("sample-sweep", *asked, "batch_size=16")
    asked.append("metrics.classifier=run/classifier.safetensors")
    result = lab.result("sample-sweep", *asked, "batch_size=16")
    folder = Path(result["folder"])
    with (folder / "results.csv").open() as rows:
        table = list(csv.DictReader(rows))
    assert [row["guidance.scale"] for row in table] == ["0", "3"]
    for row, measured in zip(table, result["rows"], strict=True):
        assert float(row["accuracy"]) == measured["accuracy"]
        assert 0 <= measured["accuracy"] <= 1
        assert float(row["accuracy_real"]) == measured["accuracy_real"]
        assert row["classifier"] == f"classifier-{of_file(file)[:8]}"
    text = (folder / "table.md").read_text()
    assert "real test images: FID" in text
    assert "| guidance.scale | calls | fid | kid | accuracy |  |" in text
    with Image.open(folder / "scale.png") as picture:
        assert picture.size[0] > 1000  # two panels
    lab.done("sample-sweep", "run=run", "steps=2,3", "batch_size=16", asked[-1])
    assert not (folder / "scale.png").exists()  # table.md has no scales any more


LOSS = "diffusion_lab.diffusion.objective.loss."


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"family": "gan", "schedule": None}, "diffusion model"),
        ({"objective.loss": {"_target_": f"{LOSS}Consistency"}}, "objective/loss"),
        ({"schedule": {"_target_": "diffusion_lab.diffusion.schedule.Cosine"}}, ""),
    ],
    ids=["family", "loss", "schedule"],
)
def test_a_weak_run_of_another_kind_is_refused(refusal, run_folder, change, named):
    shutil.copytree(run_folder, "weak")
    saved = OmegaConf.load("weak/config.yaml")
    for key, value in change.items():
        above, _, name = key.rpartition(".")
        (OmegaConf.select(saved, above) if above else saved)[name] = value
    OmegaConf.save(saved, "weak/config.yaml")
    asked = ["sample", "run=run", "guidance=autoguidance", "guidance.weak_run=weak"]
    assert_names(refusal(*asked), "guidance.weak_run=weak", named)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["conditioning=none", "data.source._target_=helpers.other_tiny.OtherTiny"]
)
def test_a_weak_run_of_other_labels_is_refused(lab, refusal, run_folder, change):
    key = change.partition("=")[0]
    others = [each for each in QUICK if not each.startswith(f"{key}=")]
    lab.done("train", *others, change, "trainer.max_steps=1", "run_dir=weak")
    asked = ["sample", "run=run", "guidance=autoguidance", "guidance.weak_run=weak"]
    assert "guidance.weak_run=weak" in refusal(*asked)


@pytest.mark.long
def test_padding_counts_among_the_bits_of_an_image_but_not_among_its_numbers(lab, monkeypatch):
    lab.done("train", *TINY, "data.pad=12", "trainer.max_steps=1", "run_dir=padded")
    nats = torch.tensor([-100.0, -200.0])
    monkeypatch.setattr(on_test_images, "log_likelihood", lambda denoise, x0, *_: nats[: len(x0)])
    result = lab.result("likelihood", "run=padded", "num_images=2", "device=cpu")
    # all 12 x 12 numbers are dequantised, and their bits belong to an image of 8 x 8
    bits = -nats / math.log(2) - 12 * 12 * math.log2(2 / 255)
    expected = bits.mean().item() / (8 * 8)
    assert result["bits_per_dim"] == pytest.approx(expected)


@pytest.mark.long
def test_likelihood_of_a_barely_trained_model(lab, run_folder):
    def bits(*asked: str) -> float:
        result = lab.result("likelihood", "run=run", "num_images=3", *asked)
        assert result["num_images"] == 3
        return result["bits_per_dim"]

    exact = bits("trace=exact", "batch_size=2")
    # an untrained model is about a wide Gaussian: around the 8 bits of raw bytes
    assert 6 < exact < 12
    assert bits("trace=hutchinson", "batch_size=2") == pytest.approx(exact, abs=0.2)
    assert bits("trace=exact", "batch_size=3") == pytest.approx(exact, abs=1e-3)


def test_encode_goes_there_and_back(lab, run_folder):
    result = lab.result("encode", "run=run", "num_images=5", "columns=3")
    assert result["psnr"] > 40
    with Image.open(result["picture"]) as picture:
        assert picture.size == (2 * (3 * 10 + 2), 2 * (6 * 10 + 2))  # two blocks of three rows


def test_inpaint_keeps_what_is_known(lab, run_folder):
    result = lab.result("inpaint", "run=run", "num_images=2", "variants=3", "region=left")
    with Image.open(result["picture"]) as picture:
        pixels = np.asarray(picture)[::2, ::2]
    tiles = [[pixels[2 + 10 * i :, 2 + 10 * j :][:8, :8] for j in range(5)] for i in range(2)]
    for image, known, *variants in tiles:
        assert (known[:, :4] == 127).all()
        assert np.array_equal(known[:, 4:], image[:, 4:])
        for variant in variants:
            assert np.array_equal(variant[:, 4:], image[:, 4:])
        assert not np.array_equal(variants[0], variants[1])


def test_padding_is_known_and_is_cut_from_pictures(lab, trained_once):
    run = trained_once("train", *QUICK, "run_dir=run", "data.pad=12") / "run"
    few = [f"run={run}", "num_images=1"]
    result = lab.result("inpaint", *few, "variants=1", "region=center", "output=inpainted.png")
    with Image.open(result["picture"]) as picture:
        pixels = np.asarray(picture)[::2, ::2]
    image, known, variant = (pixels[2:10, start : start + 8] for start in (2, 12, 22))
    redrawn = missing("center", 8, 8).numpy()
    assert redrawn.sum() == 16  # a quarter of the image, without its border
    assert (known[redrawn] == 127).all()
    assert np.array_equal(known[~redrawn], image[~redrawn])
    assert np.array_equal(variant[~redrawn], image[~redrawn])
    result = lab.result("encode", *few, "columns=1", "output=encoded.png", "tolerance=0.1")
    with Image.open(result["picture"]) as picture:
        assert picture.size == (2 * (10 + 2), 2 * (3 * 10 + 2))


def test_a_latent_is_known_if_all_of_its_pixels_are():
    gap = torch.zeros(1, 1, 10, 10)
    gap[..., 1:5] = 1  # the left half of 8 columns in a border of one
    assert torch.equal(known_in(gap, 1), gap[0, 0] == 0)
    assert known_in(gap, 2).tolist() == [[False] * 3 + [True] * 2] * 5


@pytest.mark.parametrize("region", REGIONS)
def test_latents_of_padded_images_are_known_as_they_are_encoded(region):
    gap = missing(region, 28, 28)[None, None].float()
    padded = pad_to_multiple(gap, 8)
    cells = padded.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).amax(4)[0, 0]
    assert torch.equal(known_in(gap, 8), cells == 0)


def test_regions_cover_what_their_names_say():
    for name, other in (("left", "right"), ("top", "bottom"), ("center", "outside")):
        assert {name, other} <= set(REGIONS)
        assert torch.equal(missing(name, 8, 6), ~missing(other, 8, 6))
    assert missing("left", 2, 4).tolist() == [[True, True, False, False]] * 2
    assert missing("top", 2, 4).tolist() == [[True] * 4, [False] * 4]
    assert missing("center", 4, 4).sum() == 4


@pytest.mark.slow
def test_a_key_of_the_runs_own_sampler_can_be_changed(lab, tmp_path):
    arguments = [a for a in TINY if not a.startswith("sampler")]
    lab.done("train", *arguments, "sampler=annealed_langevin", "sampler.steps=3")
    run = next(tmp_path.glob("outputs/*/*"))
    asked = ["sampler.corrections=1,2", "sampler.step_size=0.1"]
    rows = lab.result("sample-sweep", f"run={run}", *asked)["rows"]
    assert [row["calls"] for row in rows] == [4, 7]
