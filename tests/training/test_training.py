"""Training from the command line to the files, and what is trained on and measured on."""

from zlib import crc32

import pytest
import torch
from helpers.seen_images import SEEN, seen
from helpers.tiny_data import tiny_data
from helpers.tiny_runs import QUICK, TINY, checkpoint_of, rows, same, steps_of, summary_of
from PIL import Image

from diffusion_lab import runs


def test_a_run_leaves_everything_it_promises(finished_run):
    summary = summary_of(finished_run)
    assert (summary["finished"], summary["steps"], summary["images_seen"]) == (True, 4, 32)
    assert torch.__version__.startswith(summary["versions"]["torch"])
    name = "efficientnet_lite0-96/train64-16"
    for metric in ("fid", "fid_real", "kid", "kid_real"):
        assert isinstance(summary["metrics"][f"{metric}/{name}"], float)
    assert 0 < summary["metrics"]["val/loss"] < 10

    config = runs.load_config(finished_run)
    assert config.backbone.width == 32
    assert config.logger.wandb.run_id

    with Image.open(finished_run / "samples/step_0000004.png") as picture:
        # 4 classes x 2 columns of 8 px, gaps of 2, doubled: one row per class
        assert picture.size == (2 * (2 * 10 + 2), 2 * (4 * 10 + 2))


def test_rows_carry_their_axes_and_the_fixed_names(finished_run):
    found = rows(finished_run)
    keys = set().union(*found)
    assert {"train/loss", "train/lr", "train/images_per_second", "val/loss"} <= keys
    assert {"val_by_level/t0.05", "val_by_level/t0.95"} <= keys
    for row in found:
        assert row["images"] == row["step"] * 8
        assert row["seconds"] >= 0
    losses = steps_of(finished_run)
    assert losses == sorted(set(losses))


def test_checkpoint_holds_the_averaged_weights_and_loads_safely(finished_run):
    checkpoint = checkpoint_of(finished_run)
    averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert averaged.keys() == raw.keys()
    assert not same(averaged, raw)
    _, model = runs.load(finished_run)
    assert not model.denoiser.training  # dropout would change samples
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, averaged[f"denoiser.{name}"])


def test_the_same_seed_trains_the_same_model_whoever_watches(lab, tmp_path, finished_run):
    unwatched = ["callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=[]"]
    lab.done("train", *TINY, *unwatched, "run_dir=again")
    assert (tmp_path / "again/metrics.jsonl").exists()
    assert not list((tmp_path / "again").glob("*/*.csv"))
    folders = (finished_run, tmp_path / "again")
    assert same(*(runs.load(folder)[1].denoiser.state_dict() for folder in folders))


def names_and_steps(folder):
    return [(row["step"], set(row)) for row in rows(folder)]


def test_a_run_killed_in_its_last_evaluation_gets_its_metrics_when_resumed(lab, run_folder):
    whole = summary_of(run_folder)
    logged = names_and_steps(run_folder)
    (run_folder / "summary.json").unlink()
    lab.done("train", "resume=run")
    again = summary_of(run_folder)
    assert again["metrics"] == pytest.approx(whole["metrics"])
    assert again["wall_seconds"] >= whole["wall_seconds"] / 2
    assert names_and_steps(run_folder) == logged, "metrics that are measured again have one row"


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


@pytest.mark.long
def test_losses_do_not_depend_on_the_subset_that_is_trained_on(lab, tmp_path):
    found = []
    for name, size in (("all", "data.per_class=null"), ("few", "data.per_class=2")):
        still = ["optimizer.lr=0", "optimizer.weight_decay=0", "trainer.max_steps=1"]
        lab.done("train", *QUICK, *still, f"run_dir={name}", size)
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


def test_a_run_that_is_resumed_is_tested_again(lab, run_folder):
    before = summary_of(run_folder)["metrics"]
    quiet = ["callbacks.evaluation=null", "callbacks.sample_grid=null"]
    lab.done("train", "resume=run", "trainer.max_steps=6", *quiet)
    assert summary_of(run_folder)["metrics"]["test/loss"] != before["test/loss"]
    assert steps_of(run_folder, "test/loss")[-1] == 6
