"""Everything composes: each schedule x prediction x sampler trains and samples, or is refused."""

from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hydra import compose, initialize_config_dir

from diffusion_lab.build import build_model, build_pipeline
from diffusion_lab.errors import UserError

CONF = Path(__file__).parent.parent / "conf"
SHAPE, CLASSES = (1, 8, 8), 4
REFUSED = {("rectified", "eps"): "pure noise"}  # (schedule, prediction): a word of the sentence
NEEDS_TABLE = {"leading", "linspace"}  # time grids


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in (CONF / "experiment").rglob("*.yaml")
)


@pytest.fixture(scope="module")
def configure():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("train", overrides=["name=x", *overrides])


def tiny(configure, *overrides: str):
    network = ["backbone=dit", "backbone.width=16", "backbone.heads=2", "backbone.depth=1"]
    cfg = configure(*network, *overrides)
    return cfg, build_model(cfg, SHAPE, CLASSES)


@pytest.mark.parametrize(
    ("schedule", "prediction"), [*product(options("schedule"), options("objective/prediction"))]
)
def test_each_schedule_trains_with_each_prediction_and_every_sampler(
    configure, schedule, prediction
):
    overrides = [f"schedule={schedule}", f"objective/prediction={prediction}"]
    if word := REFUSED.get((schedule, prediction)):
        with pytest.raises(UserError, match=word):
            tiny(configure, *overrides)
        return
    for weighting in options("objective/weighting"):
        _, model = tiny(configure, *overrides, f"objective/weighting={weighting}")
        images = torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8)
        x0 = model.first_stage.encode(images)
        losses = model.objective(model.denoiser, x0, torch.arange(6) % CLASSES)
        assert losses.shape == (6,)
        assert losses.isfinite().all()
    for sampler in options("sampler"):
        cfg = configure(*overrides, f"sampler={sampler}", "sampler.steps=3", "guidance.scale=2")
        drawn = build_pipeline(cfg, model, CLASSES)(range(4))
        assert drawn.shape == (4, *SHAPE)
        assert drawn.dtype == torch.uint8


@pytest.mark.parametrize(
    ("schedule", "grid"), [*product(options("schedule"), options("sampler/time_grid"))]
)
def test_each_time_grid_fits_each_schedule_or_says_why_not(configure, schedule, grid):
    overrides = [f"schedule={schedule}", "objective=v_prediction", f"sampler/time_grid={grid}"]
    cfg, model = tiny(configure, *overrides)
    if grid in NEEDS_TABLE and model.schedule.discrete_steps is None:
        with pytest.raises(UserError, match="time_grid=uniform"):
            build_pipeline(cfg, model, CLASSES)
    else:
        assert build_pipeline(cfg, model, CLASSES)([0]).shape == (1, *SHAPE)


@pytest.mark.parametrize("conditioning", options("conditioning"))
@pytest.mark.parametrize("backbone", [b for b in options("backbone") if "_" not in b])
def test_each_backbone_takes_each_conditioning(configure, backbone, conditioning):
    cfg = configure(f"backbone={backbone}", f"conditioning={conditioning}")
    model = build_model(cfg, (1, 16, 16), CLASSES)
    assert build_pipeline(cfg, model, CLASSES)(range(2)).shape == (2, 1, 16, 16)


def test_guidance_of_a_model_that_cannot_be_guided_is_refused(configure):
    cfg, model = tiny(configure, "conditioning=none", "guidance=classifier_free")
    with pytest.raises(UserError, match="conditioning=class_label"):
        build_pipeline(cfg, model, CLASSES)
    cfg, model = tiny(configure, "objective.label_dropout=0", "guidance=classifier_free")
    with pytest.raises(UserError, match=r"label_dropout=0\.1"):
        build_pipeline(cfg, model, CLASSES)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["denoiser.noise_label=index"], "ddpm_linear"),
        (["denoiser.noise_label=log_sigma"], "noise_label=time"),
        (["denoiser.noise_label=x"], "log_sigma"),
    ],
)
def test_noise_labels_that_do_not_exist_are_refused(configure, overrides, word):
    with pytest.raises(UserError, match=word):
        tiny(configure, *overrides)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(lab, tmp_path, experiment):
    code, _, err = lab(
        "train",
        f"experiment={experiment}",
        "data._target_=tiny_data.TinyData",
        "+debug=fast",
        "trainer=cpu",
        "trainer.max_steps=1",
        "callbacks.evaluation=null",
        "logger=none",
        "run_dir=run",
    )
    assert code == 0, err
    assert list((tmp_path / "run/samples").glob("*.png"))


def test_a_sweep_runs_its_jobs_as_one_group(lab, tmp_path):
    arguments = [a for a in TINY if a not in ("backbone=dit", "backbone.heads=2")]
    arguments = [a for a in arguments if not a.startswith("backbone.")]
    code, _, err = lab(
        "train", "-m", "backbone=unet_small,dit", *arguments, "callbacks.evaluation=null"
    )
    assert code == 0, err
    configs = sorted(tmp_path.glob("outputs/*/*/config.yaml"))
    assert [path.parent.parent.name for path in configs] == [
        "fashion_mnist_dit",
        "fashion_mnist_unet_small",
    ]
    groups = {
        line for path in configs for line in path.read_text().splitlines() if "group:" in line
    }
    assert len(groups) == 1
    assert "null" not in groups.pop()
    for path in configs:
        assert list(path.parent.glob("wandb/offline-run-*/*.wandb")), err
