"""The configuration of a scheduler of diffusers becomes options of a schedule, or is refused."""

import json

import pytest
import torch
from helpers.compositions import composed
from helpers.refusals import refused

from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.importing.kind.diffusers import scheduler_overrides


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "sigmoid"},
        {"num_train_timesteps": 4000},
        {"trained_betas": [0.1, 0.2]},
        {"prediction_type": "other"},
    ],
    ids=str,
)
def test_a_scheduler_without_a_counterpart_is_refused(tmp_path, settings):
    known = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(known | settings))
    with refused(tmp_path, "DDPMScheduler"):
        scheduler_overrides(tmp_path, in_latents=False)


CLIPPED = {
    "unsaid by a DDPMScheduler": ({"_class_name": "DDPMScheduler"}, False, 1.0),
    "unsaid by a solver": ({"_class_name": "DPMSolverMultistepScheduler"}, False, None),
    "said": ({"_class_name": "DDIMScheduler", "clip_sample_range": 2}, False, 2.0),
    "not at all": ({"_class_name": "DDPMScheduler", "clip_sample": False}, False, None),
    "of latents": ({"_class_name": "DDIMScheduler", "clip_sample": True}, True, None),
}


@pytest.mark.parametrize(("settings", "in_latents", "clip"), CLIPPED.values(), ids=CLIPPED)
def test_a_scheduler_that_clips_images_is_a_denoiser_that_does(
    tmp_path, capfd, settings, in_latents, clip
):
    config = {"beta_schedule": "linear"} | settings
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    found = scheduler_overrides(tmp_path, in_latents)
    assert [each for each in found if "clip" in each] == [f"denoiser.clip={clip}"] * bool(clip)
    assert ("clip_sample" in capfd.readouterr().err) == in_latents


def test_a_shift_of_the_steps_is_named(tmp_path, capfd):
    path = tmp_path / "scheduler_config.json"
    said = []
    for shift in (3.0, 1.0):
        path.write_text(
            json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift})
        )
        assert "schedule=rectified" in scheduler_overrides(tmp_path, in_latents=True)
        said.append("shift=3.0" in capfd.readouterr().err)
    assert said == [True, False]


SCHEDULERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.03},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "zero": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("settings", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_becomes_its_schedule(tmp_path, settings):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", **settings)
    scheduler.save_pretrained(tmp_path)
    found = scheduler_overrides(tmp_path, in_latents=False)
    assert "objective/prediction=v" in found
    cfg = composed("train", "name=x", *(each for each in found if each.startswith("schedule")))
    levels = instantiate(cfg, "schedule")(torch.arange(1, 1001) / 1000)
    expected = scheduler.alphas_cumprod
    torch.testing.assert_close(levels.alpha.float() ** 2, expected, rtol=1e-4, atol=1e-7)
