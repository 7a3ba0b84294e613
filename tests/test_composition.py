"""All parts compose: each pair trains and samples, or is refused with the reason."""

import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from helpers.compositions import TINY_NETWORK, assembled, composed, node
from helpers.measured import loss_at
from helpers.pairs import each_once
from helpers.paths import CONF
from helpers.refusals import refused
from helpers.tiny_runs import tiny_first_stage
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffusion_lab.assembly.objects import build_model, build_pipeline, with_data_std
from diffusion_lab.common.labels import Captions, Classes, Numbers
from diffusion_lab.common.messages import UserError
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.noise import add_noise
from diffusion_lab.diffusion.sampler.time_grid import Leading, Linspace, Quadratic, Trailing
from diffusion_lab.diffusion.schedule import Rectified
from diffusion_lab.first_stage import Pixels

SHAPE, CLASSES = (1, 8, 8), 4


class Undecoded(Pixels):
    def decode(self, latents):
        return latents


def options(group: str) -> list[str]:
    """The options of diffusion models; those of other families are in training/test_families.py."""
    return sorted(
        path.stem for path in (CONF / group).glob("*.yaml") if "family=" not in path.read_text()
    )


def pairs(first: str, second: str) -> list:
    """All pairs of options of two groups; each of the first has one fast pair, the rest slow."""
    return each_once(*({name: name for name in options(group)} for group in (first, second)))


EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in (CONF / "experiment").rglob("*.yaml")
)


def tiny(*overrides: str):
    cfg = composed("train", "name=x", *TINY_NETWORK, *overrides).copy()
    return cfg, model_of(cfg)


def objective_part(kind: str, option: str):
    """Builds a prediction or a weighting for pixels."""
    chosen, key = node(f"objective/{kind}", option), f"objective.{kind.replace('/', '.')}"
    cfg = OmegaConf.create()
    OmegaConf.update(cfg, key, chosen)
    return instantiate(OmegaConf.select(with_data_std(cfg, Pixels.data_std), key))


def sampled(*overrides: str):
    """A tiny model's configuration with these options, whose sampler takes few steps."""
    cfg = assembled("guidance.scale=2", *overrides)
    if "tolerance" in cfg.sampler:
        cfg.sampler.tolerance = 0.1
    else:  # a restart needs a level that is clean enough
        cfg.sampler.steps = 18 if "restarts" in cfg.sampler else 3
    return cfg


def model_of(cfg):
    return build_model(cfg, SHAPE, Classes.numbered(CLASSES))


def draw(cfg, model) -> torch.Tensor:
    """Draws samples, not rounded to uint8, from a network whose output is not 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(model.denoiser.backbone.out.weight, std=0.1)
    drawn = replace(
        build_pipeline(cfg, model, Classes.numbered(CLASSES)), first_stage=Undecoded(SHAPE)
    )(range(4))
    assert drawn.isfinite().all()
    assert drawn.std() > 0.01
    return drawn


def says_nothing_on_pure_noise(schedule: str, prediction: str) -> bool:
    """Whether the theory forbids the pair: the output does not determine x0 at t = 1."""
    end = instantiate(node("schedule", schedule))(torch.ones(()))
    return bool(end.alpha == 0) and prediction in ("eps", "score")


def losses(model):
    images = torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8)
    x0 = model.first_stage.encode(images)
    return model.objective(model.denoiser, x0, Given(torch.arange(6) % CLASSES)).minimised


@pytest.mark.parametrize(("schedule", "prediction"), pairs("schedule", "objective/prediction"))
def test_each_schedule_trains_with_each_prediction_or_says_why_not(schedule, prediction):
    cfg = sampled(f"schedule={schedule}", f"objective/prediction={prediction}")
    if says_nothing_on_pure_noise(schedule, prediction):
        with refused(f"objective/prediction={prediction}"):
            model_of(cfg)
        return
    model = model_of(cfg)
    for weighting in options("objective/loss/weighting"):
        model.objective.loss.weighting = objective_part("loss/weighting", weighting)
        assert losses(model).shape == (6,)
        assert losses(model).isfinite().all()
    assert draw(cfg, model).shape == (4, *SHAPE)


def test_the_deviation_that_is_scaled_by_is_that_of_pixels_or_of_latents(tmp_path):
    edm = ["schedule=edm", "objective=edm", "objective/loss/weighting=edm"]
    kl = ["first_stage=kl", f"first_stage.run={tiny_first_stage(tmp_path / 'first')}"]
    own = ["objective.prediction.data_std=0.2", "denoiser.input_std=0.3"]
    for overrides, expected in (
        ([], (0.5, 0.5, 0.5)),
        (kl, (1.0, 1.0, 1.0)),
        ([*kl, *own], (0.3, 0.2, 1.0)),
    ):
        cfg, model = tiny("backbone.patch=2", *edm, *overrides)
        objective = model.objective
        found = (objective.prediction.data_std, objective.loss.weighting.data_std)
        assert (model.denoiser.input_std, *found) == expected
        assert cfg.objective.loss.weighting.data_std == "auto"


def test_some_pairs_are_refused_and_most_are_not():
    every = [*product(options("schedule"), options("objective/prediction"))]
    senseless = {pair for pair in every if says_nothing_on_pure_noise(*pair)}
    assert {("rectified", "eps"), ("zero_terminal_snr", "score")} <= senseless
    assert len(senseless) < len(every) / 4
    for schedule, prediction in senseless:
        with refused(f"objective/prediction={prediction}"):
            model_of(sampled(f"schedule={schedule}", f"objective/prediction={prediction}"))


@pytest.mark.parametrize(("sampler", "schedule"), pairs("sampler", "schedule"))
def test_each_sampler_draws_under_each_schedule(sampler, schedule):
    jumps = sampler in ("few_step", "flow_map")
    loss = ["objective/loss=mean_flow"] if jumps else []
    chosen = [f"schedule={schedule}", "objective=v_prediction", f"sampler={sampler}"]
    cfg = sampled(*chosen, *loss)
    if jumps and instantiate(cfg.schedule).discrete_steps:
        with pytest.raises(UserError, match="continuous schedule"):
            model_of(cfg)
        return
    model = model_of(cfg)
    drawn = draw(cfg, model)
    assert drawn.shape == (4, *SHAPE)
    assert torch.equal(drawn, draw(cfg, model))


@pytest.mark.parametrize(("schedule", "grid"), pairs("schedule", "sampler/time_grid"))
def test_each_time_grid_fits_each_schedule_or_says_why_not(schedule, grid):
    chosen = [f"schedule={schedule}", "objective=v_prediction", f"sampler/time_grid={grid}"]
    cfg = sampled(*chosen)
    cfg.sampler.steps = 4
    model = model_of(cfg)
    on_table = isinstance(
        instantiate(cfg.sampler.time_grid), Leading | Linspace | Quadratic | Trailing
    )
    if on_table and model.schedule.discrete_steps is None:
        with refused("sampler/time_grid=uniform"):
            draw(cfg, model)
    else:
        assert draw(cfg, model).shape == (4, *SHAPE)


@pytest.mark.parametrize(("schedule", "time_sampler"), pairs("schedule", "objective/time_sampler"))
def test_each_time_sampler_fits_each_schedule(schedule, time_sampler):
    parts = [f"objective/time_sampler={time_sampler}", "objective/loss/uncertainty=learned"]
    assert losses(model_of(sampled(f"schedule={schedule}", *parts))).isfinite().all()


@pytest.mark.parametrize("schedule", options("schedule"))
def test_learned_variance_fits_each_table_or_says_why_not(schedule):
    chosen = ["objective=v_prediction", "objective/loss/variance=hybrid", "sampler=ddpm"]
    cfg = sampled(f"schedule={schedule}", *chosen, "sampler.variance=learned")
    if instantiate(cfg.schedule).discrete_steps is None:
        with refused("objective/loss/variance=none"):
            model_of(cfg)
    else:
        model = model_of(cfg)
        assert losses(model).isfinite().all()
        assert draw(cfg, model).shape == (4, *SHAPE)


def test_the_weak_network_that_draws_alone_must_have_learned_the_variance():
    table = ["schedule=ddpm_linear", "objective=v_prediction"]
    learned = ["objective/loss/variance=hybrid", "sampler=ddpm", "sampler.variance=learned"]
    cfg = sampled(*table, *learned)
    cfg.guidance = composed("train", "name=x", "guidance=autoguidance").guidance
    model, weak = model_of(cfg), model_of(sampled(*table)).denoiser
    for scale in (0.0, 2.0):
        cfg.guidance.scale, cfg.guidance.weak_run = scale, "weak"
        built = partial(build_pipeline, cfg, model, Classes.numbered(CLASSES), weak)
        if scale:
            assert built()(range(2)).shape == (2, *SHAPE)
        else:
            with refused("sampler.variance"):
                built()


@pytest.mark.parametrize("objective", options("objective"))
def test_each_preset_trains_on_its_own_schedule(objective):
    cfg = composed("train", "name=x", f"objective={objective}")
    few_steps = not cfg.objective.loss._target_.endswith("Denoising")
    continuous = objective == "flow_matching" or few_steps
    schedule = "rectified" if continuous else "ddpm_linear"
    taught = ["objective.teacher.run=nowhere"] if cfg.objective.teacher else []
    _, model = tiny(f"objective={objective}", f"schedule={schedule}", *taught)
    if model.objective.teacher and model.objective.teacher.asked:
        model.objective.teacher.open(lambda labels: model.denoiser)
    assert losses(model).isfinite().all()


def test_jit_learns_the_clean_image_by_the_error_of_its_velocity():
    """Compares with arXiv:2511.13720, whose time is 1 - t: its logit has mean -0.8 and std 0.8."""
    _, model = tiny("objective=jit")
    level, _ = model.objective.time_sampler(4000, Rectified())
    logit = level.t.logit()
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((0.8, 0.8), abs=0.02)
    x0, eps = torch.randn(2, 4, *SHAPE)
    level = Rectified()(torch.tensor([0.01, 0.3, 0.7, 1.0]))
    with torch.no_grad():
        loss = loss_at(model.objective, model.denoiser, x0, eps, level)
        x = add_noise(x0, eps, level)
        output = model.denoiser(x, level).x0
    axes = (slice(None), None, None, None)
    velocity = (x - output) / level.sigma.clamp(min=0.05)[axes]
    target = (x - x0) / level.sigma.clamp(min=0.05)[axes]
    expected = (velocity - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=0)


# the others need another run, or a file
ALONE = [name for name in options("guidance") if name not in ("autoguidance", "classifier")]


@pytest.mark.parametrize("guidance", ALONE)
@pytest.mark.parametrize("self_conditioning", [False, True])
def test_each_guidance_draws(guidance, self_conditioning):
    twice = self_conditioning and guidance != "embedded"  # which is for few steps
    overrides = [f"guidance={guidance}", f"denoiser.self_conditioning={twice}"]
    sampler = "ddim" if guidance == "cfg_plus_plus" else "dpm_solver"
    told = ["objective=improved_mean_flow", "objective.loss.guidance=8"] * (guidance == "embedded")
    cfg, model = tiny(*overrides, *told, f"sampler={sampler}", "sampler.steps=3")
    assert losses(model).isfinite().all()
    assert draw(cfg, model).shape == (4, *SHAPE)


@pytest.mark.parametrize(
    ("backbone", "conditioning"),
    each_once(
        {name: name for name in options("backbone") if "_" not in name},
        {name: name for name in options("conditioning")},
    ),
)
def test_each_backbone_takes_each_conditioning(backbone, conditioning):
    others = {"numeric_label": Numbers(2), "caption": Captions()}
    labels = others.get(conditioning, Classes.numbered(CLASSES))
    chosen = [f"backbone={backbone}", f"conditioning={conditioning}"]
    cfg = composed("train", "name=x", *chosen).copy()
    if conditioning == "raw_labels":  # of networks that embed labels, and no basic one does
        with refused("conditioning=raw_labels", "conditioning=class_label"):
            build_model(cfg, (1, 16, 16), labels)
        return
    model = build_model(cfg, (1, 16, 16), labels)
    assert build_pipeline(cfg, model, labels)(range(2)).shape == (2, 1, 16, 16)


VARIANTS = (  # others of their kind are fast tests, or their objectives are trained in training/
    "toy/score_matching",
    *(
        f"fashion_mnist/{name}"
        for name in (
            *("unet", "latent_unet", "latent_dit", "vae", "ncsn", "edm2"),
            *("ect", "mean_flow", "shortcut", "reflow"),
        )
    ),
)


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name.startswith(("cifar10/", *VARIANTS)) else []
        )
        for name in EXPERIMENTS  # CIFAR-10 experiments have large networks
    ],
)
def test_every_experiment_runs(lab, tmp_path, request, experiment):
    generated = experiment.startswith("toy/")  # needs no download
    text = (CONF / f"experiment/{experiment}.yaml").read_text()
    command = re.search(r"diffusion-lab (\S+) experiment", text)[1]
    latent = "first_stage.run=" in text
    kind = "vq" if experiment.endswith("autoregressive") else "kl"
    taught = "objective.teacher.run=" in text
    teacher = [f"objective.teacher.run={request.getfixturevalue('finished_run')}"] if taught else []
    teacher += ["objective.teacher.count=8", "objective.teacher.cache_dir=pairs"] if taught else []
    lab.done(
        command,
        f"experiment={experiment}",
        *([] if generated else ["data.source._target_=helpers.tiny_data.TinyData"]),
        *teacher,
        *([f"first_stage.run={tiny_first_stage(tmp_path / 'first', kind)}"] if latent else []),
        "+debug=fast",
        "trainer=cpu",
        "trainer.max_steps=1",
        "callbacks.evaluation=null",
        "logger=none",
        "run_dir=run",
    )
    assert list((tmp_path / "run/samples").glob("*.png"))
