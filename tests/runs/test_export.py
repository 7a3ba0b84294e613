"""Exports and models that ship with the package: opened like a run and never overwritten."""

import errno
import hashlib
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.compositions import composed
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK, checkpoint_of, tiny_first_stage
from safetensors import safe_open

import diffusion_lab as dl
from diffusion_lab import runs
from diffusion_lab.runs import pretrained
from diffusion_lab.runs.folder import save_config


@pytest.fixture
def trained(lab, tmp_path, trained_once):
    """The checkpoint of a run in run/, in the folder of `lab`."""
    shutil.copytree(trained_once("train", *QUICK, "run_dir=run"), tmp_path, dirs_exist_ok=True)
    return checkpoint_of(tmp_path / "run")


def samples(lab, run):
    return lab.drawn(f"run={run}", "num_samples=4")["images"]


@pytest.mark.long
def test_an_export_has_the_averaged_weights_and_samples_like_its_run(lab, tmp_path, trained):
    result = lab.result("export", "run=run", "output=models/mine")
    assert result["step"] == "4"
    folder = tmp_path / "models/mine"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml"}
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    exported = safetensors.torch.load_file(folder / "model.safetensors")
    averaged = {
        name.removeprefix("denoiser."): value
        for name, value in trained["state_dict"].items()
        if name.startswith("denoiser.")
    }
    assert exported.keys() == averaged.keys()
    assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
    with safe_open(folder / "model.safetensors", "pt") as file:
        facts = {"average": "evaluated", "step": "4", "run": "run"}
        assert file.metadata() == {"format": "pt", **facts}
    assert np.array_equal(samples(lab, "run"), samples(lab, "models/mine"))
    _, model = runs.load(folder)  # as in the README
    assert all(torch.equal(v, averaged[name]) for name, v in model.denoiser.state_dict().items())


def test_the_steps_of_an_export_are_not_waited_for(refusal, tmp_path, finished_run):
    shutil.copy(finished_run / "config.yaml", tmp_path)
    (tmp_path / "model.safetensors").touch()
    for line in ("memorization step=all", "sample step=2"):
        sentence = refusal(*line.split(), f"run={tmp_path}")
        assert_names(sentence, line.split()[1], "an export", "leave step out")


def test_trained_weights_are_an_option(lab, tmp_path, trained):
    lab.done("export", "run=run", "output=raw", "average=trained")
    exported = safetensors.torch.load_file(tmp_path / "raw/model.safetensors")
    raw = trained["current_model_state"]
    assert all(torch.equal(value, raw[f"denoiser.{name}"]) for name, value in exported.items())


@pytest.mark.long
def test_half_precision_halves_the_file_and_hardly_changes_samples(lab, refusal, tmp_path, trained):
    lab.done("export", "run=run", "output=whole")
    lab.done("export", "run=run", "output=half", "dtype=float16")
    files = [tmp_path / each / "model.safetensors" for each in ("whole", "half")]
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    whole, half = (safetensors.torch.load_file(file) for file in files)
    assert all(torch.equal(half[name], value.half()) for name, value in whole.items())
    gap = np.abs(samples(lab, "whole").astype(int) - samples(lab, "half"))
    assert gap.max() <= 3
    assert_names(refusal("export", "run=run", "output=x", "dtype=int8"), "dtype", "float16")
    both = ["format=diffusers", "dtype=float16"]
    assert_names(refusal("export", "run=run", "output=x", *both), "dtype", "format=run")


@pytest.mark.long
def test_an_export_of_an_export_is_the_same_and_none_is_a_run(lab, refusal, tmp_path, trained):
    lab.done("export", "run=run", "output=mine")
    lab.done("export", "run=mine", "output=again")
    mine, again = (tmp_path / name / "model.safetensors" for name in ("mine", "again"))
    with safe_open(mine, "pt") as first, safe_open(again, "pt") as second:
        assert first.metadata() == second.metadata()
    assert np.array_equal(samples(lab, "mine"), samples(lab, "again"))
    before = mine.read_bytes()
    assert "output=mine" in refusal("export", "run=run", "output=mine")
    assert "average=trained" in refusal("export", "run=mine", "output=new", "average=trained")
    assert "average=trained" in refusal("sample", "run=mine", "average=trained")
    for arguments in (["resume=mine", "trainer.max_steps=9"], [*QUICK, "run_dir=mine"]):
        sentence = refusal("train", *arguments)
        assert "mine" in sentence
        assert "delete" not in sentence
    assert mine.read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_nothing(refusal, tmp_path, trained, small_files):
    sentence = refusal("export", "run=run", "output=models/mine")
    assert "output=models/mine" in sentence
    assert os.strerror(errno.EFBIG) in sentence
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.long
def test_an_export_takes_its_first_stage_along(lab, tmp_path):
    tiny_first_stage(tmp_path / "kl")
    latent = ["first_stage=kl", "first_stage.run=kl", "backbone.patch=1"]
    lab.done("train", *QUICK, *latent, "run_dir=run", "trainer.max_steps=2")
    lab.done("export", "run=run", "output=mine")
    assert (tmp_path / "mine/first_stage.safetensors").exists()
    assert np.array_equal(samples(lab, "run"), samples(lab, "mine"))


def test_an_autoencoder_has_its_own_file(refusal, tmp_path):
    save_config(tmp_path, composed("train_autoencoder", "name=x"))
    assert "first_stage.safetensors" in refusal("export", "run=.", "output=new")


@pytest.fixture
def shipped(lab, tmp_path, trained_once, monkeypatch):
    """A package with a tiny model, in place of its own; the folder of `lab` is empty."""
    shutil.copytree(trained_once("train", *QUICK, "run_dir=run"), tmp_path / "elsewhere")
    lab.done("export", "run=elsewhere/run", "output=models/tiny")
    monkeypatch.setattr(pretrained, "MODELS", tmp_path / "models")


def test_a_model_of_the_package_is_a_run_in_the_outputs(lab, refusal, shipped, tmp_path):
    result = lab.result("sample", "run=pretrained:tiny", "num_samples=2", "sampler.steps=2")
    assert result["grid"].startswith("outputs/pretrained/tiny/samples/")
    lab.result("sample", "pretrained:tiny", "num_samples=1", "sampler.steps=2")
    model = dl.load("pretrained:tiny")
    weights = dl.load(tmp_path / "models/tiny").denoiser.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in model.denoiser.state_dict().items())
    assert_names(refusal("sample", "run=pretrained:tony"), "pretrained:tony", "tiny")
    # a newer model takes the place of an older copy
    copy = tmp_path / pretrained.local("pretrained:tiny") / "model.safetensors"
    copy.write_bytes(b"older")
    pretrained.local("pretrained:tiny")
    assert copy.read_bytes() == (tmp_path / "models/tiny/model.safetensors").read_bytes()
    assert pretrained.local("outputs/tiny") == "outputs/tiny"


@pytest.mark.parametrize("name", pretrained.names())
def test_a_shipped_model_is_small_described_and_draws_clothes(name):
    folder = pretrained.MODELS / name
    weights = (folder / "model.safetensors").read_bytes()
    assert len(weights) < 5_000_000
    assert hashlib.sha256(weights).hexdigest() in (folder / "README.md").read_text()
    images = dl.load(folder).sample(10, steps=5).float()
    assert images.shape == (10, 1, 28, 28)
    assert images.flatten(1).std(1).min() > 20  # no image is of one grey
    by_class = images.flatten(1).mean(1)
    assert by_class[4] > 1.3 * by_class[5]  # a coat fills more than a sandal
