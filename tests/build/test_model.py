"""Checks of a model before training: the refusals and the advice."""

from functools import partial

import pytest
import torch
from helpers.refusals import assert_names, refused

from diffusion_lab.backbone import MLP, Energy
from diffusion_lab.backbone.conditioning import ClassLabel
from diffusion_lab.build.model import (
    Model,
    advice,
    check_network,
    check_training,
    hardly_jumps,
    steep_label,
)
from diffusion_lab.common.labels import Classes
from diffusion_lab.data.augmentation import NonLeaky
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.objective import (
    SNR,
    X0,
    Eps,
    ExactScoreMatching,
    Flow,
    Hybrid,
    Objective,
    Score,
    UniformTime,
    V,
)
from diffusion_lab.diffusion.objective.jump_loss import MeanFlow, Shortcut
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding
from diffusion_lab.first_stage import Pixels


def objective(schedule, prediction, variance_loss=None):
    return Objective(schedule, prediction, UniformTime(), variance_loss=variance_loss)


@pytest.mark.parametrize(
    ("prediction", "name"), [(Eps(), "eps"), (Score(), "score"), (Score(False), "score")]
)
def test_noise_and_score_are_refused_where_the_schedule_reaches_pure_noise(prediction, name):
    with refused(f"objective/prediction={name}", "objective/prediction=v"):
        check_training(Rectified(), objective(Rectified(), prediction), "time")
    check_training(Cosine(), objective(Cosine(), prediction), "time")


def test_a_learned_variance_needs_a_table_of_two_levels():
    for schedule in (Cosine(), Rectified(), DDPMLinear(1, 1e-5, 1e-4)):
        with refused("objective/variance_loss=none"):
            check_training(schedule, objective(schedule, V(), Hybrid()), "time")
    check_training(DDPMLinear(), objective(DDPMLinear(), V(), Hybrid()), "time")


def test_a_large_gain_is_advised_against_unless_clipped():
    eps = objective(Cosine(), Eps())
    assert advice(Cosine(), eps, clipped=False) == [
        "objective/prediction=eps multiplies the network's error by 22026 at the noisiest level; "
        "sample with guidance.clip=1, or use objective/prediction=v"
    ]
    assert advice(Cosine(), eps, clipped=True) == []
    (line,) = advice(Cosine(), eps, clipped=False, latents=True)
    assert "clip" not in line
    assert "use objective/prediction=v" in line


@pytest.mark.parametrize("jump_loss", [MeanFlow(), Shortcut(), None])
def test_a_steep_label_is_advised_against_where_it_is_differentiated(jump_loss):
    trained = Objective(Rectified(), Flow(), UniformTime(), jump_loss=jump_loss)
    network = partial(MLP, width=8, depth=1)

    def warning(label: str) -> str | None:
        return steep_label(Denoiser(network, ClassLabel, Flow(), (1, 2, 2), 3, label), trained)

    assert warning("data_time") is None
    if isinstance(jump_loss, MeanFlow):
        assert_names(warning("time"), "denoiser.noise_label=time", "denoiser.noise_label=auto")
    else:
        assert warning("time") is None


@pytest.mark.parametrize(
    ("schedule", "prediction", "flat"),
    [
        (Rectified(), Flow(), False),
        (Cosine(), Eps(), False),
        (Rectified(), V(), True),
        (Cosine(), V(), True),
        (Rectified(), X0(), True),
    ],
)
def test_a_target_without_a_divisor_at_the_longest_jump_is_advised_against(
    schedule, prediction, flat
):
    for loss in (MeanFlow(), Shortcut(), None):
        said = hardly_jumps(Objective(schedule, prediction, UniformTime(), jump_loss=loss))
        assert (said is not None) == (flat and isinstance(loss, MeanFlow))
        if said:
            assert_names(said, "objective/prediction=flow", "schedule=rectified")


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (DDPMLinear(), Eps()),
        (Cosine(), V()),
        (Rectified(), Flow()),
        (VarianceExploding(), Score()),
        (VarianceExploding(), Score(scale_by_sigma=False)),  # a gain of 6400 on outputs of 1/80
    ],
)
def test_usual_compositions_need_no_advice(schedule, prediction):
    assert advice(schedule, objective(schedule, prediction), clipped=False) == []


def test_mirroring_twice_is_advised_against():
    arguments = (Cosine(), objective(Cosine(), V()), Guidance())
    for flip_x, flipped in ((True, True), (True, False), (False, True)):
        augmentation = NonLeaky(0.1, flip_x, False, 0, 0, 0, 0)
        lines = advice(*arguments, augmentation, flipped)
        assert [line for line in lines if "write data.flip=false" in line] == lines
        assert bool(lines) == (flip_x and flipped)
    assert advice(*arguments, None, True) == []


ENERGY = partial(Energy, network=partial(MLP, width=8, depth=1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("network", "parts"),
    [
        (ENERGY.keywords["network"], {"jump_loss": MeanFlow()}),
        (ENERGY, {"weighting": SNR()}),
        (ENERGY, {"weighting": SNR(), "score_loss": ExactScoreMatching()}),
    ],
)
def test_a_trial_of_the_derivative_leaves_the_network_and_the_draws_as_they_were(
    device, network, parts
):
    jumps = "jump_loss" in parts
    with torch.device(device):
        denoiser = Denoiser(
            network, ClassLabel, Flow(), (1, 2, 2), labels=Classes.numbered(3), jumps=jumps
        )
    parts = Objective(Rectified(), Flow(), UniformTime(), **parts)
    before = torch.get_rng_state()
    check_network(Model(denoiser, Rectified(), parts, Pixels((1, 2, 2)), None))
    assert torch.equal(torch.get_rng_state(), before)
    assert denoiser.training
    assert all(parameter.grad is None for parameter in denoiser.parameters())
