"""Models that ship with the package are runs that nobody has to train."""

import hashlib
import shutil

import pytest
import torch
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK

import diffusion_lab as dl
from diffusion_lab.runs import pretrained


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


def test_a_newer_model_takes_the_place_of_an_older_copy(shipped, tmp_path):
    copy = tmp_path / pretrained.local("pretrained:tiny") / "model.safetensors"
    copy.write_bytes(b"older")
    pretrained.local("pretrained:tiny")
    assert copy.read_bytes() == (tmp_path / "models/tiny/model.safetensors").read_bytes()
    assert pretrained.local("outputs/tiny") == "outputs/tiny"


@pytest.mark.parametrize("name", pretrained.names())
def test_a_shipped_model_is_small_described_and_draws_clothes(name):
    folder = pretrained.MODELS / name
    weights = (folder / "model.safetensors").read_bytes()
    assert len(weights) < 1_000_000
    assert hashlib.sha256(weights).hexdigest() in (folder / "README.md").read_text()
    images = dl.load(folder).sample(10, steps=5).float()
    assert images.shape == (10, 1, 28, 28)
    assert images.flatten(1).std(1).min() > 20  # no image is of one grey
    by_class = images.flatten(1).mean(1)
    assert by_class[4] > 1.3 * by_class[5]  # a coat fills more than a sandal
