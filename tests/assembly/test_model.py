"""Checks of a model before training: the refusals and the advice."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.refusals import assert_names, refused
from torch._dynamo.utils import counters

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.model import check_network, compile_model, untrained_jumps
from diffusion_lab.backbone import MLP, Energy
from diffusion_lab.backbone.conditioning import ClassLabel
from diffusion_lab.common.labels import Classes
from diffusion_lab.data.augmentation import NonLeaky
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective import (
    X0,
    Eps,
    Flow,
    Objective,
    Score,
    SecondMoment,
    UniformTime,
    V,
)
from diffusion_lab.diffusion.objective.loss import (
    SNR,
    Denoising,
    ExactScoreMatching,
    Hybrid,
    MeanFlow,
    Shortcut,
)
from diffusion_lab.diffusion.sampler import FewStep, FlowMap, UniformGrid, UniPC
from diffusion_lab.diffusion.sampler.time_grid import Explicit, Karras
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
    for asked, flipped in ((True, True), (False, False), (False, True)):
        teacher = SimpleNamespace(asked=asked)  # one that draws the images has no flips
        assert bool([*rules.warned(teacher=teacher, flipped=flipped)]) == (flipped and not asked)


def test_levels_fewer_than_the_bins_that_learn_from_them_are_warned_of():
    bins = SecondMoment(bins=100)
    (said,) = rules.warned(schedule=DDPMLinear(steps=50), time_sampler=bins)
    assert_names(said, "objective.time_sampler.bins=50")
    for schedule in (DDPMLinear(steps=100), Cosine()):
        assert [*rules.warned(schedule=schedule, time_sampler=bins)] == []


ENERGY = partial(Energy, network=partial(MLP, width=8, depth=1))


class Counted(Denoising):
    """Somebody's own loss, which draws and counts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def __call__(self, *parts):
        self.calls += torch.rand(())
        return super().__call__(*parts)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("network", "loss"),
    [
        (ENERGY.keywords["network"], Counted()),
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
    parts = Objective(Rectified(), Flow(), SecondMoment(), loss)
    before = torch.get_rng_state()
    check_network(denoiser, parts)
    assert torch.equal(torch.get_rng_state(), before)
    assert {buffer.device.type for buffer in parts.buffers()} == {"cpu"}
    assert not getattr(loss, "calls", 0)
    assert denoiser.training
    assert all(parameter.grad is None for parameter in denoiser.parameters())


EVEN, VISIBLE = UniformGrid(0.0), UniformGrid(0.1)


def warning(sampler, schedule=None, loss=None):
    schedule, loss = schedule or Rectified(), loss or Shortcut()
    return untrained_jumps(loss, sampler, schedule)


@pytest.mark.parametrize("finest", [2, 8, 32])
@pytest.mark.parametrize("schedule", [Rectified(), VarianceExploding()])
def test_even_grids_of_powers_of_two_take_the_jumps_that_are_trained(finest, schedule):
    trained = {2**k for k in range(finest.bit_length() - 1)}
    for steps in range(1, 2 * finest):
        said = warning(FlowMap(steps, EVEN), schedule, Shortcut(finest=finest))
        assert (said is None) == (steps in trained)
        if said:
            assert_names(said, f"sampler.steps={max(each for each in trained if each <= steps)}")


@pytest.mark.parametrize("schedule", [Rectified(), VarianceExploding()])
@pytest.mark.parametrize("sampler", [FlowMap, FewStep])
@pytest.mark.parametrize("grid", [EVEN, VISIBLE, Karras(0.1, 80.0)])
def test_what_the_warning_says_to_write_silences_it(schedule, sampler, grid):
    for steps in (3, 4, 12, 16, 24, 100, 128):
        if said := warning(sampler(steps, grid), schedule):
            assert_names(said, "sampler/time_grid=uniform", "sampler.time_grid.sigma_min=0")
            written = int(said.partition("sampler.steps=")[2].split()[0])
            assert warning(sampler(written, EVEN), schedule) is None


def test_grids_that_end_at_visible_noise_leave_these_jumps():
    for schedule, longest in ((Rectified(), 8), (VarianceExploding(), 2)):
        assert warning(FlowMap(longest, VISIBLE), schedule) is None
        said = warning(FlowMap(2 * longest, VISIBLE), schedule)
        assert_names(said, "sampler.time_grid.sigma_min=0")
        assert warning(FlowMap(2 * longest, EVEN), schedule) is None
    assert warning(FlowMap(4, Karras(0.1, 80.0)), VarianceExploding())


def test_jumps_to_clean_data_are_trained_from_halves_of_the_path():
    for steps in (1, 2):
        assert warning(FewStep(steps, EVEN)) is None
    for steps in (3, 4):
        assert_names(warning(FewStep(steps, EVEN)), "sampler.steps=2")
    assert warning(FewStep(4, Explicit([1.0, 0.5, 0.25, 0.125]))) is None
    assert warning(FewStep(4, Explicit([1.0, 0.5, 0.25, 0.1])))


def test_other_models_and_solvers_of_short_steps_are_not_warned_of():
    assert warning(FlowMap(3, EVEN), loss=MeanFlow()) is None
    assert warning(UniPC(3, EVEN)) is None


@pytest.mark.long
def test_the_loss_is_in_the_graph_of_a_compiled_network_in_training_alone(monkeypatch):
    denoiser = Denoiser(partial(MLP, width=8), ClassLabel, Flow(), (1, 4, 4), Classes.numbered(3))
    x0, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])

    def losses(objective):
        torch.manual_seed(0)
        denoiser.zero_grad()
        trained = objective(denoiser, x0, Given(labels)).minimised
        trained.mean().backward()
        in_training = counters["stats"]["calls_captured"]
        level = objective.schedule(torch.full((4,), 0.5))
        with torch.no_grad():
            inputs = objective.schedule, denoiser.prediction, denoiser, x0, x0, level
            validated = objective.loss.measured(*inputs, Given(labels))
        gradients = [each.grad.clone() for each in denoiser.parameters()]
        return [trained, validated, *gradients], in_training

    def objective():
        return Objective(Rectified(), Flow(), UniformTime(), Denoising(), label_dropout=0.5)

    plain, _ = losses(objective())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    calls = {}
    for mode in ("layers", None):
        torch.compiler.reset()
        counters.clear()
        compiled = objective()
        compile_model(denoiser, compiled, mode)
        answers, calls[mode] = losses(compiled)
        torch.testing.assert_close(answers, plain)
        # with a gradient, and without one for samplers and validation
        assert counters["stats"]["unique_graphs"] == 2
    assert calls[None] > calls["layers"]
