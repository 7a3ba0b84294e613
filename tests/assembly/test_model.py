"""Checks of a model before training: the refusals and the advice."""

from functools import partial

import pytest
import torch
from helpers.refusals import assert_names, refused

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.model import (
    check_network,
)
from diffusion_lab.backbone import MLP, Energy
from diffusion_lab.backbone.conditioning import ClassLabel
from diffusion_lab.common.labels import Classes
from diffusion_lab.data.augmentation import NonLeaky
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.objective import X0, Eps, Flow, Objective, Score, UniformTime, V
from diffusion_lab.diffusion.objective.loss import (
    SNR,
    Denoising,
    ExactScoreMatching,
    Hybrid,
    MeanFlow,
    Shortcut,
)
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding


@pytest.mark.parametrize(
    ("prediction", "name"), [(Eps(), "eps"), (Score(), "score"), (Score(False), "score")]
)
def test_noise_and_score_are_refused_where_the_schedule_reaches_pure_noise(prediction, name):
    with refused(f"objective/prediction={name}", "objective/prediction=v"):
        rules.check(schedule=Rectified(), prediction=prediction)
    rules.check(schedule=Cosine(), prediction=prediction)


def test_a_learned_variance_needs_a_table_of_two_levels():
    loss = Denoising(variance=Hybrid())
    for schedule in (Cosine(), Rectified(), DDPMLinear(1, 1e-5, 1e-4)):
        with refused("objective/loss/variance=none"):
            rules.check(schedule=schedule, loss=loss)
    rules.check(schedule=DDPMLinear(), loss=loss)


def test_a_large_gain_is_advised_against_unless_clipped():
    parts = {"schedule": Cosine(), "prediction": Eps()}
    (line,) = rules.warned(**parts, clipped=False)
    assert_names(line, "objective/prediction=eps", "guidance.clip=1", "objective/prediction=v")
    assert list(rules.warned(**parts, clipped=True)) == []


class OwnMeanFlow(MeanFlow):
    """A user's variant, which is told apart by nobody."""


@pytest.mark.parametrize("loss", [MeanFlow(), OwnMeanFlow(), Shortcut(), Denoising()])
def test_a_steep_label_is_advised_against_where_it_is_differentiated(loss):
    assert list(rules.warned(loss=loss, noise_label="data_time")) == []
    said = list(rules.warned(loss=loss, noise_label="time"))
    assert len(said) == isinstance(loss, MeanFlow)
    for each in said:
        assert_names(each, "denoiser.noise_label=time", "denoiser.noise_label=auto")


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
    for loss in (MeanFlow(), OwnMeanFlow(), Shortcut(), Denoising()):
        said = list(rules.warned(loss=loss, schedule=schedule, prediction=prediction))
        assert len(said) == (flat and isinstance(loss, MeanFlow))
        for each in said:
            assert_names(each, "objective/prediction=flow", "schedule=rectified")


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
    assert list(rules.warned(schedule=schedule, prediction=prediction, clipped=False)) == []


def test_mirroring_twice_is_advised_against():
    for flip_x, flipped in ((True, True), (True, False), (False, True)):
        augmentation = NonLeaky(0.1, flip_x, False, 0, 0, 0, 0)
        lines = list(rules.warned(augmentation=augmentation, flipped=flipped))
        assert [line for line in lines if "write data.flip=false" in line] == lines
        assert bool(lines) == (flip_x and flipped)
    assert list(rules.warned(augmentation=None, flipped=True)) == []


ENERGY = partial(Energy, network=partial(MLP, width=8, depth=1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("network", "loss"),
    [
        (ENERGY.keywords["network"], MeanFlow()),
        (ENERGY, Denoising(SNR())),
        (ENERGY, ExactScoreMatching(SNR())),
    ],
)
def test_a_trial_of_the_derivative_leaves_the_network_and_the_draws_as_they_were(
    device, network, loss
):
    with torch.device(device):
        labels, jumps = Classes.numbered(3), loss.two_levels
        denoiser = Denoiser(network, ClassLabel, Flow(), (1, 2, 2), labels, jumps=jumps)
    parts = Objective(Rectified(), Flow(), UniformTime(), loss)
    before = torch.get_rng_state()
    check_network(denoiser, parts)
    assert torch.equal(torch.get_rng_state(), before)
    assert denoiser.training
    assert all(parameter.grad is None for parameter in denoiser.parameters())
