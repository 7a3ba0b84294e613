"""Training, validation and test images of a run: what is trained on, and what is measured on."""

from zlib import crc32

import pytest
from helpers.seen_images import seen
from helpers.tiny_data import tiny_data
from helpers.tiny_runs import QUICK, rows, summary_of

SEEN = ["+callbacks.seen._target_=helpers.seen_images.SeenImages", "+callbacks.seen.folder=seen"]


def hashes(images) -> set[int]:
    return {crc32(image.numpy().tobytes()) for image in images}


def test_an_epoch_holds_every_training_image_and_no_validation_image(lab, tmp_path):
    err = lab.done("train", *QUICK, *SEEN, "run_dir=run", "trainer.max_steps=16")
    data, steps = tiny_data(), seen(tmp_path / "seen")
    assert "64 for training, 20 for validation, 32 for tests" in err
    first = [image for step in range(8) for image in steps[step]]
    assert sorted(first) == sorted(hashes(data.train_images()))
    everything = {image for images in steps.values() for image in images}
    assert not everything & hashes(data.validation_rows()[:])
    summary = summary_of(tmp_path / "run")
    assert (summary["training_images"], summary["validation_images"]) == (64, 20)


def test_losses_do_not_depend_on_the_subset_that_is_trained_on(lab, tmp_path):
    found = []
    for name, size in (("all", "data.per_class=null"), ("few", "data.per_class=2")):
        still = ["optimizer.lr=0", "optimizer.weight_decay=0", f"run_dir={name}", size]
        lab.done("train", *QUICK, *still)
        found.append(summary_of(tmp_path / name)["metrics"])
    assert found[0] == found[1]
    assert found[0]["val/loss"] != found[0]["test/loss"]
    assert {"val_by_level/t0.05", "test_by_level/t0.05"} <= set(found[0])


@pytest.mark.slow
def test_a_run_without_validation_images_is_tested_all_the_same(lab, tmp_path):
    options = ["data.validation_size=0", "callbacks.checkpoint.every_n_steps=2", "run_dir=run"]
    lab.done("train", *QUICK, *options)
    names = set(summary_of(tmp_path / "run")["metrics"])
    assert "test/loss" in names
    assert not {name for name in names if name.startswith("val")}
    assert not {name for row in rows(tmp_path / "run") for name in row if name.startswith("val")}


def test_a_run_that_is_resumed_is_tested_again(lab, tmp_path):
    lab.done("train", *QUICK, "run_dir=run")
    before = summary_of(tmp_path / "run")["metrics"]
    lab.done("train", "resume=run", "trainer.max_steps=6")
    assert summary_of(tmp_path / "run")["metrics"]["test/loss"] != before["test/loss"]
    assert [row["step"] for row in rows(tmp_path / "run") if "test/loss" in row][-1] == 6
