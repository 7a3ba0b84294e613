"""The training loss: the papers' formulas, and stored values of a tiny denoiser."""

import pytest
import torch
from helpers.measured import loss_at
from test_jumps import MIXTURE, SCHEDULES, ExactMap, points
from torch import nn

from diffusion_lab.backbone.conditioning import ClassLabel, Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate, Given
from diffusion_lab.diffusion.noise import add_noise, noise_of
from diffusion_lab.diffusion.objective import (
    EDM,
    X0,
    BatchShare,
    Eps,
    Flow,
    LogitNormal,
    LogNormal,
    Objective,
    Score,
    SecondMoment,
    UniformTime,
    V,
)
from diffusion_lab.diffusion.objective.loss import (
    Contrastive,
    Denoising,
    LearnedUncertainty,
    MinSNR,
    Parts,
)
from diffusion_lab.diffusion.objective.loss.base import pseudo_huber
from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

PRESETS = {
    "ddpm": lambda **k: Objective(DDPMLinear(), Eps(), UniformTime(), Denoising(), **k),
    "v_prediction": lambda **k: Objective(Cosine(), V(), UniformTime(), Denoising(), **k),
    "flow_matching": lambda **k: Objective(
        Rectified(), Flow(), LogitNormal(stratified=True), **{"loss": Denoising(), **k}
    ),
    "edm": lambda **k: Objective(VarianceExploding(), EDM(), LogNormal(), Denoising(), **k),
}
GOLDEN = {  # mean losses of steps 0, 1, 5, 10 and 19
    "ddpm": [0.6254458, 0.4382969, 0.7314252, 0.5870224, 0.6992015],
    "v_prediction": [0.5110337, 0.545449, 0.743714, 0.6017895, 0.5377005],
    "flow_matching": [1.462992, 0.815244, 1.039968, 1.081822, 0.8076562],
    "edm": [1.092201, 0.6876824, 1.272383, 1.419209, 1.192709],
}


class Linear(nn.Module):
    """Output 0.3 x + 0.1 t + 0.05 label: a denoiser whose losses can be written down."""

    self_conditioning = False

    def __init__(self, prediction, conditioning=None, clip=None):
        super().__init__()
        self.clip = clip
        self.prediction = prediction
        self.conditioning = conditioning or Unconditional(Classes.numbered(0), 0)
        self.seen = None

    def forward(self, x, level, given=NOTHING):
        self.seen = labels = given.labels
        shift = 0.1 * level.like(x).t
        if labels is not None:
            shift = shift + 0.05 * labels[:, None, None, None]
        output = 0.3 * x + shift
        x0 = self.prediction.to_x0(output, x, level)
        return Estimate(x0 if self.clip is None else x0.clamp(-self.clip, self.clip), None, output)


class Answer:
    """A denoiser that always gives the same estimate."""

    def __init__(self, estimate, clip=None):
        self.estimate, self.clip = estimate, clip

    def __call__(self, *_):
        return self.estimate


def batch(n=16):
    return torch.linspace(-1, 1, n * 4).reshape(n, 1, 2, 2).sin()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PRESETS)
def test_golden_losses(name):
    objective = PRESETS[name]()
    denoiser, generator = Linear(objective.prediction), seeded()
    losses = [objective(denoiser, batch(), generator=generator).minimised for _ in range(20)]
    assert losses[0].shape == (16,)
    assert losses[0].dtype == torch.float32
    stored = [losses[i].mean().item() for i in (0, 1, 5, 10, 19)]
    assert stored == pytest.approx(GOLDEN[name], rel=1e-5)


def level_and_noise(schedule, n=16):
    return schedule(torch.linspace(0.05, 0.95, n)), torch.randn(n, 1, 2, 2)


def test_without_a_weighting_it_is_the_squared_error_of_the_output():
    objective = PRESETS["flow_matching"]()
    level, eps = level_and_noise(objective.schedule)
    x0, t = batch(), level.t.float()[:, None, None, None]
    output = 0.3 * ((1 - t) * x0 + t * eps) + 0.1 * t
    expected = (output - (eps - x0)).square().mean((1, 2, 3))
    losses = loss_at(objective, Linear(Flow()), x0, eps, level)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("c", [0.00054, 0.03, 10.0])
def test_pseudo_huber_is_the_papers(c):
    """Compares with section 3.3 of arXiv:2310.14189, where the norm is that of a whole sample."""
    objective = PRESETS["flow_matching"](loss=Denoising(huber=c))
    level, eps = level_and_noise(objective.schedule)
    x0, denoiser = batch().double(), Linear(Flow())
    eps = eps.double()
    output = denoiser(add_noise(x0, eps, level), level).output
    square, whole = (output - (eps - x0)).square().sum((1, 2, 3)), c * 4**0.5
    expected = ((square + whole**2).sqrt() - whole) / 4**0.5
    losses = loss_at(objective, denoiser, x0, eps, level)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("prediction", [Eps(), X0(), V(), Flow(), EDM(), Score(), Score(False)])
def test_a_weighted_loss_is_of_the_error_of_x0_for_every_prediction(prediction):
    level, eps = level_and_noise(Cosine())
    denoiser, x0 = Linear(prediction), batch().double()
    eps = eps.double()
    error = (denoiser(add_noise(x0, eps, level), level).x0 - x0).square().mean((1, 2, 3))
    snr = (level.alpha / level.sigma) ** 2
    for huber, expected in ((None, error), (0.1, (error + 0.01).sqrt() - 0.1)):
        loss = Denoising(MinSNR(5.0), huber=huber)
        objective = Objective(Cosine(), prediction, UniformTime(), loss)
        losses = loss_at(objective, denoiser, x0, eps, level)
        torch.testing.assert_close(losses, snr.clamp(max=5) * expected)


def test_pseudo_huber_is_exact_for_tiny_errors_and_moves_the_best_estimate_to_the_median():
    assert pseudo_huber(torch.tensor(1e-12), 1.0).item() == pytest.approx(5e-13)
    x0 = torch.tensor([-1.0] * 7 + [0.6] * 3).reshape(10, 1, 1, 1)
    level, eps = Rectified()(torch.ones(10)), torch.zeros(10, 1, 1, 1)
    best = {}
    for c in (0.001, 100.0):
        objective = Objective(Rectified(), X0(), UniformTime(), Denoising(huber=c))

        def loss(value, objective=objective):
            output = torch.full_like(x0, value)
            answer = Answer(Estimate(output, None, output))
            return loss_at(objective, answer, x0, eps, level).mean().item()

        best[c] = min(torch.linspace(-1.5, 1, 251).tolist(), key=loss)
    assert best[0.001] == pytest.approx(-1, abs=0.02)  # the median
    assert best[100.0] == pytest.approx(-0.52, abs=0.02)  # the mean


@pytest.mark.parametrize("prediction", [Flow(), V(), X0(), EDM()])
def test_a_clipped_estimate_has_no_error_beyond_a_limit_that_the_data_is_at(prediction):
    objective = Objective(Cosine(), prediction, UniformTime(), Denoising())
    level, eps = level_and_noise(objective.schedule)
    x0 = batch().double().clamp(-0.2, 0.2)  # some values are at each limit
    eps = eps.double()
    losses = loss_at(objective, Linear(prediction, clip=0.2), x0, eps, level)
    x = add_noise(x0, eps, level)
    estimate = Linear(prediction)(x, level)
    error = estimate.output - prediction.target(x0, eps, level)
    exact = ((x0 == 0.2) & (estimate.x0 >= 0.2)) | ((x0 == -0.2) & (estimate.x0 <= -0.2))
    assert 0 < exact.double().mean() < 1
    expected = torch.where(exact, 0, error).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected)
    assert (losses < loss_at(objective, Linear(prediction), x0, eps, level)).any()


def test_clipping_does_not_move_the_best_estimate():
    # data is -1 with probability 0.7, else 0.6: the mean is -0.52
    x0 = torch.tensor([-1.0] * 7 + [0.6] * 3).reshape(10, 1, 1, 1)
    objective = Objective(Rectified(), X0(), UniformTime(), Denoising())
    level, eps = objective.schedule(torch.ones(10)), torch.zeros(10, 1, 1, 1)

    def loss(value, data=x0, clip=1.0):
        output = torch.full_like(data, value)
        answer = Answer(Estimate(output.clamp(-1, 1), None, output), clip)
        return (
            loss_at(
                objective,
                answer,
                data,
                eps[: len(data)],
                level[: len(data)],
            )
            .mean()
            .item()
        )

    candidates = torch.linspace(-2, 1, 301).tolist()
    assert min(candidates, key=loss) == pytest.approx(-0.52, abs=0.011)
    black = x0[:7]
    assert loss(-1.3, black) == loss(-1.0, black) == 0
    assert loss(-0.9, black) == pytest.approx(0.01)
    assert loss(-1.3, black, clip=None) == pytest.approx(0.09)


def test_call_is_loss_at_the_drawn_levels_times_importance():
    class Doubled(UniformTime):
        def importance(self, t):
            return 2 * super().importance(t)

    objective = Objective(Rectified(), V(), Doubled(), Denoising())
    losses = objective(Linear(V()), batch(), generator=seeded()).minimised
    generator = seeded()
    level, _ = UniformTime()(16, objective.schedule, generator)
    eps = torch.randn(16, 1, 2, 2, generator=generator)
    assert torch.equal(
        losses,
        2 * loss_at(objective, Linear(V()), batch(), eps, level),
    )


def test_labels_are_dropped_sample_by_sample_at_the_given_rate():
    objective = PRESETS["flow_matching"](label_dropout=0.25)
    denoiser = Linear(Flow(), ClassLabel(labels=Classes.numbered(10), width=4))
    labels = torch.arange(4000) % 10
    objective(denoiser, batch(4000), Given(labels), seeded())
    dropped = denoiser.seen == 10  # the null label
    assert dropped.double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(denoiser.seen[~dropped], labels[~dropped])

    PRESETS["flow_matching"]()(denoiser, batch(), Given(labels[:16]), seeded())
    assert torch.equal(denoiser.seen, labels[:16])  # the default drops none


def test_an_unconditional_model_ignores_labels():
    objective = PRESETS["flow_matching"](label_dropout=0.5)
    objective(Linear(Flow()), batch(), Given(torch.arange(16)), seeded())
    objective(Linear(Flow(), ClassLabel(Classes.numbered(10), 4)), batch(), Given(), seeded())


def test_noise_is_float32_whatever_the_default_dtype():
    objective, denoiser, x0 = PRESETS["flow_matching"](), Linear(Flow()), batch()
    expected = objective(denoiser, x0, generator=seeded()).minimised
    torch.set_default_dtype(torch.bfloat16)
    try:
        losses = objective(denoiser, x0, generator=seeded()).minimised
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(losses, expected)


def test_offset_noise_has_one_more_value_a_channel():
    """Cov(eps) is 1 + 0.5^2 1 1^T within a channel, and 0 across channels."""
    objective, denoiser = PRESETS["flow_matching"](offset_noise=0.5), Linear(Flow())
    seen = {}
    objective.loss.measured = lambda schedule, prediction, denoiser, x0, eps, *rest: (
        seen.update(eps=eps) or eps[:, 0, 0, 0]
    )
    objective(denoiser, torch.zeros(40_000, 2, 2, 1), generator=seeded())
    covariance = torch.cov(seen["eps"].flatten(1).T)
    within = torch.eye(2) + 0.25
    expected = torch.block_diag(within, within)
    assert (covariance - expected).abs().max() < 0.03


def test_a_batch_in_parts_is_stratified_as_a_whole():
    objective, denoiser = PRESETS["flow_matching"](), Linear(Flow())
    times = []
    objective.loss.measured = lambda schedule, prediction, denoiser, x0, eps, level, *rest: (
        times.append(level.t) or level.t
    )
    for part in range(4):
        objective(denoiser, batch(4), generator=seeded(part), share=BatchShare(part, 4))
    u = torch.special.ndtr(torch.cat(times).logit())
    assert sorted((u * 16).ceil().long().tolist()) == list(range(1, 17))


def test_the_time_sampler_is_told_the_losses_of_all_processes_without_their_importance():
    objective = Objective(
        Rectified(),
        V(),
        SecondMoment(bins=2, history=2),
        Denoising(uncertainty=LearnedUncertainty()),
    )
    # known losses make the importance differ from 1, and u from 0
    objective.time_sampler.observe(torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([3.0, 3, 1, 1]))
    torch.nn.init.ones_(objective.loss.uncertainty.weight)
    told = []
    objective.time_sampler.observe = lambda *arguments: told.append(arguments)
    twice = lambda values: values.repeat(2)  # noqa: E731
    objective(
        Linear(V()), batch().requires_grad_(), generator=seeded(), share=BatchShare(gather=twice)
    )
    ((t, losses, gather),) = told
    generator = seeded()
    level, importance = objective.time_sampler(16, Rectified(), generator)
    assert (importance != 1).all()
    eps = torch.randn(16, 1, 2, 2, generator=generator)
    assert torch.equal(t, level.t)
    assert torch.equal(
        losses,
        loss_at(objective, Linear(V()), batch(), eps, level),
    )
    assert not losses.requires_grad
    assert gather is twice


def test_what_the_objective_learns_is_in_its_state_and_nothing_else():
    plain = [build() for build in PRESETS.values()]
    assert [list(objective.state_dict()) for objective in plain] == [[]] * len(plain)
    learning = Objective(
        Rectified(), V(), SecondMoment(), Denoising(uncertainty=LearnedUncertainty())
    )
    assert set(learning.state_dict()) == {
        "time_sampler.history",
        "time_sampler.count",
        "loss.uncertainty.weight",
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_best_contrastive_output_is_moved_away_from_the_mean_target(name):
    schedule, prediction = SCHEDULES[name]
    x0, eps, level, _ = points(schedule, count=40_000)
    x, parts = add_noise(x0, eps, level), Parts(schedule, prediction, UniformTime())
    mean = ExactMap(prediction).mean(x, level)
    own = prediction.target(mean, noise_of(x, mean, level), level)
    others = prediction.target((MIXTURE.weights @ MIXTURE.means).expand_as(x), 0 * x, level)
    error = torch.zeros_like(x, requires_grad=True)

    class Best(ExactMap):
        def __call__(self, x, level, given=NOTHING):
            return Estimate(mean, None, (own - 0.2 * others) / 0.8 + error)

    found = Contrastive(0.2)(parts, Best(prediction), x0, eps, level, NOTHING, None)
    (update,) = torch.autograd.grad(found.minimised.sum(), error)
    for feature in (torch.ones_like(x), x, level.t[:, None]):
        each = update * feature
        assert each.mean().abs() < 3.5 * each.std() / len(x) ** 0.5
    assert update.std() > 0.1
    plain = Denoising()(parts, Best(prediction), x0, eps, level, NOTHING, None)
    torch.testing.assert_close(found.observed[1], plain.minimised.detach())
