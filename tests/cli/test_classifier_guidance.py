"""Guidance by a classifier, from the command line: also of runs without labels."""

from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_runs import ALONE, TINY, summary_of, tiny_classifier, tiny_first_stage

from diffusion_lab import load
from diffusion_lab.common.files import read_rows
from diffusion_lab.metrics.extractor.classifier import SmallClassifier, save_classifier

UNLABELLED = [*TINY, *ALONE, "conditioning=none", "guidance=none", "run_dir=run"]
CLASSIFIER = ["guidance=classifier", "guidance.classifier=guide.safetensors"]


@pytest.fixture
def write(lab, tmp_path):
    """A function: write(name, seed) writes a classifier of the tiny data."""
    return lambda name, seed: tiny_classifier(tmp_path / f"{name}.safetensors", seed)


def drawn(lab, *arguments: str) -> dict:
    return lab.drawn("run=run", "num_samples=8", "output=x", *arguments)


@pytest.mark.slow
def test_a_run_without_labels_draws_a_class_that_a_classifier_asks_for(lab, write):
    write("guide", 0)
    lab.done("train", *UNLABELLED)
    free = drawn(lab)
    assert "labels" not in free
    off = drawn(lab, *CLASSIFIER, "guidance.scale=0")
    assert (off["images"] == free["images"]).all()
    assert off["labels"].tolist() == [0, 1, 2, 3] * 2
    # a network of four steps has a nearly constant estimate, so the scale is large
    strong = [*CLASSIFIER, "guidance.scale=1e4"]
    first, last = (drawn(lab, *strong, f"labels={label}") for label in (0, 3))
    assert first["labels"].tolist() == [0] * 8
    assert (first["images"] != last["images"]).any()
    assert (first["images"] != free["images"]).any()


@pytest.mark.slow
def test_a_sweep_measures_by_another_classifier_and_tells_files_apart(lab, refusal, write):
    write("guide", 0)
    write("judge", 1)
    lab.done("train", *UNLABELLED)
    asked = ["sample-sweep", "run=run", "steps=2", "batch_size=16", *CLASSIFIER]
    judged = [*asked, "metrics.classifier=judge.safetensors", "guidance.scale=0,1"]
    rows = lab.result(*judged)["rows"]
    assert [row["calls"] for row in rows] == [2, 2]  # and a backward pass, which is not counted
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert "guide.safetensors" in refusal(*asked, "metrics.classifier=guide.safetensors")
    alone = ["metrics.classifier=judge.safetensors", "guidance=none"]
    assert "of known classes" in refusal("sample-sweep", "run=run", "steps=2", *alone)
    (kept,) = Path("run").glob("sweeps/*/results.jsonl")
    assert len(read_rows(kept)) == 2
    write("guide", 2)  # another file at the same path
    lab.done(*judged)
    assert len(read_rows(kept)) == 4


@pytest.mark.long
def test_a_run_is_evaluated_with_the_guidance_of_a_classifier_while_it_trains(lab, write, tmp_path):
    write("guide", 0)
    write("judge", 1)
    judged = ["conditioning=none", "metrics.classifier=judge.safetensors"]
    lab.done("train", *TINY, *CLASSIFIER, *judged, "logger=none", "run_dir=run")
    summary = summary_of(tmp_path / "run")
    assert any(name.startswith("accuracy/") for name in summary["metrics"])
    images = drawn(lab, "precision=32-true")["images"]
    assert np.array_equal(load("run").sample(8).permute(0, 2, 3, 1).numpy(), images)


def test_a_classifier_of_other_classes_is_refused(refusal, tmp_path):
    facts = {"shape": [1, 8, 8], "classes": ["a", "b"]}
    save_classifier(SmallClassifier((1, 8, 8), 2), tmp_path / "guide.safetensors", facts)
    assert "guidance.classifier=guide.safetensors" in refusal("train", *TINY, *CLASSIFIER)


def test_latents_are_not_classified(refusal, write, tmp_path):
    write("guide", 0)
    tiny_first_stage(tmp_path / "first")
    latent = ["first_stage=kl", "first_stage.run=first", "backbone.patch=2"]
    assert "latents" in refusal("train", *TINY, *latent, *CLASSIFIER)
