"""Budgets of a comparison: time limits, images and FLOPs, and what was spent before a run."""

import pytest
from helpers.fake_runs import UNET, fake_group, said

from diffusion_lab.analysis.comparison.comparing import collect
from diffusion_lab.analysis.comparison.fairness import notes

FIDS = [100.0, 101.0, 99.0]
MACS = 2_000_000  # of a fake run, which sees 6,400 images
BY_CLOCK = {"trainer": {"max_steps": 10**6, "max_time": "00:00:10:00"}}


def seconds(limit: int) -> dict:
    return {"budget": {"seconds": limit}}


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (seconds(300), seconds(600), "300 and 600 seconds"),
        (seconds(400), {}, "400 seconds, or none"),
        (seconds(400), BY_CLOCK, "400 and 600 seconds"),
    ],
)
def test_unequal_time_limits_are_named(tmp_path, ours, theirs, words):
    fake_group(tmp_path, "dit", FIDS, config=ours)
    fake_group(tmp_path, "unet", FIDS, config=UNET | theirs, summary={"images_seen": 32_000})
    _, text = said(tmp_path)
    assert f"Time limits are unequal: {words}" in text
    assert "Budgets" not in text
    note = f"Runs had time limits of {words}, and saw 6,400 to 32,000 images"
    assert note in notes(collect([tmp_path]).groups)


def test_a_limit_that_was_not_reached_is_none(tmp_path):
    """Both runs ended with their last step, although one had a time limit."""
    config = {"trainer": BY_CLOCK["trainer"] | {"max_steps": 100}}
    fake_group(tmp_path, "dit", FIDS, config=config)
    fake_group(tmp_path, "unet", FIDS, config=UNET | config)
    assert "Every run saw 6,400 images" in notes(collect([tmp_path]).groups)


def trained_for(root, name: str, images: int, passes: float, config=None, **more) -> None:
    summary = {"images_seen": images, "forward_passes": passes} | more
    fake_group(root, name, FIDS, config=config, summary=summary)


def test_equal_operations_of_unequal_images_are_said_with_those_of_teachers(tmp_path):
    trained_for(tmp_path, "dit", 6400, 3)
    trained_for(tmp_path, "unet", 4800, 4, UNET)
    # 1,600 and 3,200 images of 3 passes each, and 4,800 calls
    pupil = {"objective": {"_target_": "lab.Pupil", "teacher": {"run": "t"}}, "init_from": "t"}
    teacher = {"teacher_images": 3200, "teacher_calls": 4840, "teacher_macs": MACS}
    trained_for(tmp_path, "pupil", 1600, 3, pupil, **teacher)
    words = "of initial weights, are equal within 0.21 %: runs saw 1.6k to 6.4k"
    text = said(tmp_path)[1]
    assert words in text
    assert "Budgets" not in text
    assert "not counted" not in text
    # what its initial weights took is known of the first, and the second does not count
    begun = {"began_from_flops": 2 * 3 * 3200 * MACS}
    trained_for(tmp_path, "tuned", 2400, 4, {"backbone": {"width": 48}, "init_from": "y"}, **begun)
    assert words in said(tmp_path)[1]
    assert "not counted" not in said(tmp_path)[1]
    trained_for(tmp_path, "ect", 2400, 4, {"backbone": {"width": 64}, "init_from": "x"})
    text = said(tmp_path)[1]
    assert f"{words} images; those of some initial weights are not counted" in text
    assert text.count("starts from weights of another training") == 2


@pytest.mark.parametrize(
    ("passes", "more"),
    [
        (3, {}),
        (4, {"teacher_images": 10}),
        (4, {"teacher_images": 0, "teacher_calls": None, "teacher_macs": MACS}),
        (4, {"teacher_images": None, "teacher_calls": 0, "teacher_macs": MACS}),
        (4, {"macs": None}),
        (4, {"forward_passes": None}),
    ],
)
def test_operations_that_are_unequal_or_unknown_leave_budgets_unequal(tmp_path, passes, more):
    trained_for(tmp_path, "dit", 6400, 3)
    trained_for(tmp_path, "unet", 4800, passes, UNET, **more)
    assert "Budgets are unequal: runs saw 4.8k to 6.4k images" in said(tmp_path)[1]


def test_a_loss_with_a_further_pass_takes_more_operations_at_equal_images(tmp_path):
    trained_for(tmp_path, "flow", 6400, 3)
    trained_for(tmp_path, "mean_flow", 6400, 4, UNET)
    assert "Operations are unequal: compositions take 12M to 16M FLOPs" in said(tmp_path)[1]


def test_a_first_stage_is_said_to_be_trained_besides(tmp_path):
    fake_group(tmp_path, "dit", FIDS)
    stage = {"first_stage": {"_target_": "diffusion_lab.first_stage.TrainedKL", "run": "x"}}
    fake_group(tmp_path, "latent", FIDS, config=UNET | stage)
    text = said(tmp_path)[1]
    assert text.count("has a first stage") == 1
    assert "UNet has a first stage with a training of its own, which" in text


def test_what_was_spent_before_a_run_is_said_where_it_is_known(tmp_path):
    stage = {"first_stage": {"_target_": "diffusion_lab.first_stage.TrainedKL", "run": "x"}}
    fake_group(tmp_path, "latent", FIDS, config=stage, summary={"first_stage_seconds": 600.0})
    begun = UNET | {"init_from": "x"}
    fake_group(tmp_path, "begun", FIDS, config=begun, summary={"began_from_images": 94_400})
    aligned = {"backbone": {"width": 5}, "alignment": {"weight": 0.5}}
    fake_group(tmp_path, "aligned", FIDS, config=aligned)
    text = said(tmp_path)[1]
    assert text.count("is aligned with a frozen network") == 1
    assert "has a first stage with a training of its own, of 10 min, which" in text
    assert "starts from weights of another training, of 94.4k images, which" in text


@pytest.mark.parametrize(
    ("settings", "same"), [({}, True), ({"patch_size": 2}, True), ({"patch_size": 4}, False)]
)
def test_a_transformer_of_diffusers_writes_patches(tmp_path, settings, same):
    dit = {"name": "DiTTransformer2DModel", "settings": {"num_layers": 2} | settings}
    dit["_target_"] = "diffusion_lab.backbone.DiffusersModel"
    fake_group(tmp_path, "theirs", FIDS, config={"backbone": dit})
    fake_group(tmp_path, "dit", FIDS, config={"backbone": {"patch": 2}})
    assert ("Output layers are unequal" in said(tmp_path)[1]) is not same
