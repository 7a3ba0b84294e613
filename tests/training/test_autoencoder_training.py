"""First stages are trained from the command line to their file; their runs resume."""

import os
import shutil
import signal
from contextlib import nullcontext

import pytest
import torch
from helpers.compositions import composed
from helpers.refusals import refused
from helpers.tiny_data import TinyData, tiny_data
from helpers.tiny_runs import ADVERSARIAL, TINY_AUTOENCODER, checkpoint_of, rows, same, summary_of
from PIL import Image

from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.families.autoencoder.task import AutoencoderModule, build_task, quality
from diffusion_lab.first_stage.autoencoder import saving

TRAIN = ["train-autoencoder", *TINY_AUTOENCODER]
QUIET = ["callbacks.evaluation=null", "callbacks.sample_grid=null"]


@pytest.fixture
def finished(trained_once):
    """The folder in which a run was trained as `run`; nobody writes into it."""
    return trained_once(*TRAIN, "run_dir=run")


@pytest.mark.long
def test_a_run_stopped_in_its_tests_saves_the_same_first_stage(lab, tmp_path, monkeypatch):
    average = "+callbacks.weight_averaging._target_=diffusion_lab.training.callbacks.EMA"
    averaged = [*TRAIN, *QUIET, average, "optimizer.lr=0.1", "trainer.precision=32-true"]
    lab.done(*averaged, "run_dir=whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            AutoencoderModule, "test_step", lambda *_: os.kill(os.getpid(), signal.SIGINT)
        )
        err = lab.done(*averaged, "run_dir=parts", code=130)
    assert "diffusion-lab train-autoencoder resume=parts" in err
    assert not (tmp_path / "parts" / saving.FIRST_STAGE_FILE).exists()
    lab.done("train-autoencoder", "resume=parts")
    whole, parts = (
        saving.load_autoencoder(tmp_path / run / saving.FIRST_STAGE_FILE)[0].state_dict()
        for run in ("whole", "parts")
    )
    assert same(parts, whole)
    trained = checkpoint_of(tmp_path / "whole")["current_model_state"]
    assert any(not torch.equal(trained[f"autoencoder.{name}"], whole[name]) for name in whole)


def test_a_run_leaves_everything_it_promises(finished):
    folder = finished / "run"
    summary = summary_of(folder)
    assert (summary["finished"], summary["steps"]) == (True, 4)
    metrics = summary["metrics"]
    assert {"rfid/efficientnet_lite0-96/train64-16", "val/psnr", "val/kl"} <= set(metrics)
    assert "rfid_real/efficientnet_lite0-96/train64-16" in metrics
    found = set().union(*rows(folder))
    assert {"train/loss", "train/l1", "train/bottleneck", "val/psnr"} <= found
    assert {f"val_latent/{what}{i}" for what in ("mean", "std") for i in range(4)} <= found
    with Image.open(folder / "samples/step_0000004.png") as picture:
        # 8 images in rows of 2, and 4 rows of reconstructions
        assert picture.size == (2 * (2 * 10 + 2), 2 * (8 * 10 + 2))

    autoencoder, facts, _ = saving.load_autoencoder(folder / saving.FIRST_STAGE_FILE)
    data = tiny_data()
    data.setup("fit")
    assert data.images_fingerprint != data.fingerprint
    assert (facts.kind, facts.data, facts.image_shape) == ("kl", data.images_fingerprint, [1, 8, 8])
    assert facts.metrics == metrics
    assert {name.partition(".")[0] for name in autoencoder.state_dict()} == {"encoder", "decoder"}
    with torch.no_grad():
        moments = autoencoder.moments(to_float(data.train_images()))
        drawn = torch.cat([autoencoder.sample(moments) for _ in range(50)])
    mean, std = torch.tensor(facts.latent_mean), torch.tensor(facts.latent_std)
    torch.testing.assert_close(drawn.mean((0, 2, 3)), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std((0, 2, 3)), std, atol=0.05, rtol=0.02)


@pytest.mark.slow
def test_a_silent_adversary_stays_as_it_was(lab, tmp_path):
    options = [*ADVERSARIAL, "reconstruction.discriminator.start=9", "optimizer.weight_decay=0.5"]
    states = []
    for steps in (1, 3):
        length = ["lr_schedule=constant", f"trainer.max_steps={steps}", f"run_dir={steps}"]
        lab.done(*TRAIN, *options, *length, *QUIET)
        path = tmp_path / f"{steps}/checkpoints/last.ckpt"
        states.append(torch.load(path, weights_only=True)["state_dict"])
    for name, value in states[0].items():
        if name.startswith("loss.") or value.ndim > 1:  # a gain or bias may have no gradient yet
            assert torch.equal(value, states[1][name]) == name.startswith("loss."), name


@pytest.mark.slow
def test_a_compiled_autoencoder_meets_its_adversary(lab, tmp_path):
    lab.done(*TRAIN, *ADVERSARIAL, "compile=true", "callbacks.evaluation=null", "run_dir=run")
    assert any("train/adversarial_weight" in row for row in rows(tmp_path / "run"))


def test_a_file_that_is_lost_is_written_again_and_a_run_without_a_checkpoint_named(
    lab, refusal, tmp_path, finished
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run" / saving.FIRST_STAGE_FILE
    content = path.read_bytes()
    assert "trainer.max_steps" in refusal("train-autoencoder", "resume=run")
    path.unlink()
    lab.done("train-autoencoder", "resume=run")
    assert path.read_bytes() == content

    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    for arguments in ([*TRAIN, "run_dir=run"], ["train-autoencoder", "resume=run"]):
        assert "checkpoint" in refusal(*arguments)


def test_psnr_and_ssim():
    images = torch.randint(0, 200, (3, 1, 16, 16), dtype=torch.uint8)
    psnr, ssim = quality(images, images)
    assert (psnr, ssim) == (300, pytest.approx(3.0))
    psnr, ssim = quality(images, images + 10)
    assert psnr == pytest.approx(3 * 28.131, abs=1e-2)  # 20 log10(255 / 10)
    assert ssim < 3
    assert quality(images[..., :8, :8], images[..., :8, :8])[1].isnan()


@pytest.mark.parametrize(("side", "measured"), [(10, False), (12, True)])
def test_checkpoints_are_ranked_by_ssim_where_images_are_large_enough(monkeypatch, side, measured):
    monkeypatch.setattr(TinyData, "native_shape", (1, side, side))
    task = build_task(composed("train_autoencoder", *TINY_AUTOENCODER, "name=x"))
    with nullcontext() if measured else refused("val/ssim", "val/psnr"):
        task.check_ranking(["val/ssim"])
    assert task.measures("test/ssim") == measured
    assert task.measures("val/kl")
    assert not task.measures("val/loss")


def test_padding_is_no_part_of_the_quality_of_a_vae(lab, tmp_path):
    options = ["data.pad=16", *QUIET, "trainer.precision=32-true"]
    options += ["autoencoder=vae", "reconstruction=likelihood"]
    lab.done(*TRAIN, *options, "run_dir=run")
    metrics = summary_of(tmp_path / "run")["metrics"]
    autoencoder, _, _ = saving.load_autoencoder(tmp_path / "run" / saving.FIRST_STAGE_FILE)
    data = tiny_data(pad=16)
    data.setup("fit")
    images = data.validated_on().images[:]
    back = to_uint8(autoencoder.decode(autoencoder.mean(autoencoder.moments(to_float(images)))))
    psnr = quality(data.to_native(images), data.to_native(back))[0] / 20
    assert metrics["val/psnr"] == pytest.approx(float(psnr), abs=0.02)
    assert abs(float(quality(images, back)[0]) / 20 - float(psnr)) > 0.1
    assert "val/ssim" not in metrics  # 8 x 8 pixels are too few


def test_a_run_is_resumed_by_the_command_that_made_it(refusal, finished_run, finished):
    for command, run, other in (
        ("train-autoencoder", finished / "run", "train"),
        ("train", finished_run, "train-autoencoder"),
    ):
        sentence = refusal(other, f"resume={run}", "trainer.max_steps=9")
        assert f"diffusion-lab {command} resume={run}" in sentence
