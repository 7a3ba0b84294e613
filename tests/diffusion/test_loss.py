"""The training loss: the papers' formulas, and stored values of a tiny denoiser."""

import math

import pytest
import torch
from helpers.measured import loss_at
from test_jumps import MIXTURE, SCHEDULES, ExactMap, points
from torch import nn

from diffusion_lab.backbone.conditioning import ClassLabel, Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import NOTHING, Estimate, Given
from diffusion_lab.diffusion.noise import add_noise, broadcast, noise_of
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
    P2,
    SNR,
    Contrastive,
    Denoising,
    EDMWeight,
    Hybrid,
    LearnedUncertainty,
    MinSNR,
    Parts,
    SigmoidWeight,
    SoftMinSNR,
    TruncatedSNR,
    VelocityWeight,
)
from diffusion_lab.diffusion.objective.loss.base import pseudo_huber
from diffusion_lab.diffusion.objective.loss.variance import negative_log_likelihood
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
        shift = 0.1 * broadcast(level.t, x)
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
        return loss_at(objective, answer, data, eps[: len(data)], level[: len(data)]).mean().item()

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
    assert torch.equal(losses, 2 * loss_at(objective, Linear(V()), batch(), eps, level))


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
    assert torch.equal(losses, loss_at(objective, Linear(V()), batch(), eps, level))
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


def test_what_is_clamped_and_exact_is_not_pushed_away_from_other_samples():
    schedule, prediction = Rectified(), Flow()
    x0, eps = torch.tensor([[1.0, -1.0, 0.3], [-1.0, -1.0, 1.0]]), torch.zeros(2, 3)
    level, parts = schedule(torch.tensor([0.5, 0.5])), Parts(schedule, prediction, UniformTime())
    output = torch.tensor([[-8.0, 8.0, -0.4], [8.0, 8.0, 8.0]], requires_grad=True)

    class Clamped(ExactMap):
        clip = 1.0

        def __call__(self, x, level, given=NOTHING):
            return Estimate(prediction.to_x0(output, x, level).clamp(-1, 1), None, output)

    found = Contrastive(0.2)(parts, Clamped(prediction), x0, eps, level, NOTHING, None)
    (update,) = torch.autograd.grad(found.minimised.sum(), output)
    expected = torch.zeros(2, 3)  # but where an estimate is inside, or at the wrong limit
    for image, place in ((0, 2), (1, 2)):
        own, other = -x0[image, place], -x0[1 - image, place]
        out = output[image, place].item()
        expected[image, place] = 2 / 3 * ((out - own) - 0.2 * (out - other))
    torch.testing.assert_close(update, expected)


def on_output(weighting, prediction, level):
    """Returns the weight of the squared error of the network's output."""
    return weighting(level.logsnr) * prediction.x0_gain(level) ** 2


def levels(schedule):
    return schedule(torch.linspace(0.05, 0.95, 19))


def test_min_snr_is_capped_at_gamma():
    snr = torch.tensor([0.0, 0.25, 4.0, 5.0, 6.0, math.inf], dtype=torch.float64)
    assert MinSNR().gamma == 5
    assert MinSNR()(snr.log()).tolist() == pytest.approx([0, 0.25, 4, 5, 5, 5])
    assert MinSNR(2.0)(snr.log()).tolist() == pytest.approx([0, 0.25, 2, 2, 2, 2])


def test_min_snr_on_outputs_is_the_published_weight():
    level = Cosine()(torch.linspace(0.05, 0.95, 19))
    snr, weight = level.logsnr.exp(), MinSNR(5.0)(level.logsnr)
    torch.testing.assert_close(weight * Eps().x0_gain(level) ** 2, snr.clamp(max=5) / snr)
    torch.testing.assert_close(weight * V().x0_gain(level) ** 2, snr.clamp(max=5) / (snr + 1))


def test_snr_is_the_plain_loss_of_eps_and_sigma_squared_times_that_of_the_score():
    level = levels(Cosine())
    one = torch.ones(19, dtype=torch.float64)
    torch.testing.assert_close(on_output(SNR(), Eps(), level), one)
    torch.testing.assert_close(on_output(SNR(), Score(), level), one)
    unscaled = on_output(SNR(), Score(scale_by_sigma=False), level)
    torch.testing.assert_close(unscaled, level.sigma**2)  # NCSN's lambda(sigma)


def test_truncated_snr_is_the_published_weight_of_x0():
    """Compares with max(alpha^2 / sigma^2, 1) of arXiv:2202.00512."""
    level = levels(Cosine())
    expected = (level.alpha**2 / level.sigma**2).clamp(min=1)
    torch.testing.assert_close(TruncatedSNR()(level.logsnr), expected)
    assert TruncatedSNR()(torch.tensor(-math.inf)) == 1


@pytest.mark.parametrize("std", [0.5, 0.6162])
def test_soft_min_snr_on_edm_outputs_is_k_diffusions(std):
    """Compares with k-diffusion's weight of the preconditioned output, with equal constants."""
    level = levels(VarianceExploding())
    expected = (level.sigma * std) ** 2 / (level.sigma**2 + std**2) ** 2
    weight = on_output(SoftMinSNR(gamma=std**-2), EDM(std), level)
    torch.testing.assert_close(weight, expected)
    assert SoftMinSNR().gamma == 0.5**-2


def test_soft_min_snr_has_min_snr_at_both_ends():
    far = torch.tensor([-30.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(SoftMinSNR(5.0)(far), MinSNR(5.0)(far))
    middle = torch.tensor(math.log(5.0), dtype=torch.float64)
    assert SoftMinSNR(5.0)(middle).item() == pytest.approx(2.5)


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 1.0), (0.0, 2.0), (1.0, 0.3)])
def test_p2_on_eps_is_the_published_weight(gamma, k):
    """Compares with 1 / (k + snr)^gamma on the simple loss (arXiv:2204.00227)."""
    level = levels(Cosine())
    snr = level.alpha**2 / level.sigma**2
    torch.testing.assert_close(on_output(P2(gamma, k), Eps(), level), 1 / (k + snr) ** gamma)
    assert (P2().gamma, P2().k) == (1, 1)


@pytest.mark.parametrize("std", [0.5, 0.7])
def test_edm_weight_is_the_published_one_and_plain_on_its_own_outputs(std):
    """Compares with (sigma^2 + s^2) / (sigma s)^2, c_out^2 times it with 1 (arXiv:2206.00364)."""
    level = levels(VarianceExploding())
    expected = (level.sigma**2 + std**2) / (level.sigma * std) ** 2
    torch.testing.assert_close(EDMWeight(std)(level.logsnr), expected)
    on_edm = on_output(EDMWeight(std), EDM(std), level)
    torch.testing.assert_close(on_edm, torch.ones_like(on_edm))
    assert EDMWeight().data_std == 0.5


@pytest.mark.parametrize("bias", [-1.0, 2.0])
def test_sigmoid_on_eps_is_the_published_weight(bias):
    """Compares with sigmoid(bias - logsnr) on eps, lower on clean data (arXiv:2303.00848)."""
    level = levels(Cosine())
    on_eps = on_output(SigmoidWeight(bias), Eps(), level)
    torch.testing.assert_close(on_eps, 1 / (1 + (level.logsnr - bias).exp()))
    assert on_eps[0] < 0.1 < 0.9 < on_eps[-1]
    assert SigmoidWeight().bias == -1


def test_velocity_weight_is_the_plain_loss_of_flow_matching_down_to_its_smallest_sigma():
    level = levels(Rectified())
    one = torch.ones(19, dtype=torch.float64)
    torch.testing.assert_close(on_output(VelocityWeight(0.01), Flow(), level), one)
    level = Rectified()(torch.tensor([0.001, 0.04, 0.05, 0.06]))
    weight = VelocityWeight()(level.logsnr)  # of JiT's clipped denominators
    torch.testing.assert_close(weight, level.sigma.clamp(min=0.05) ** -2, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        on_output(VelocityWeight(0.01), Flow(), levels(Cosine())), one
    )  # on any schedule


WEIGHTS = [MinSNR(), SoftMinSNR(), SNR(), TruncatedSNR(), P2(), EDMWeight(), SigmoidWeight()]


@pytest.mark.parametrize("weighting", [*WEIGHTS, VelocityWeight()])
def test_weights_are_finite_and_not_negative_down_to_pure_noise(weighting):
    logsnr = torch.tensor([-math.inf, -20.0, 0.0, 20.0], dtype=torch.float64)
    weight = weighting(logsnr)
    assert weight.isfinite().all()
    assert weight.min() >= 0
    assert weight.dtype == torch.float64


STEPS = 100
SCHEDULE = DDPMLinear(STEPS)
BOUND = Hybrid(1 / STEPS)  # L_t itself
FIRST, LAST = 0, STEPS - 1  # indices of the table, as in the published code


class Published:
    """guided-diffusion's bound in float64, from its betas alone; t are indices from 0."""

    def __init__(self, alphas_cumprod):
        previous = torch.cat([torch.ones(1).double(), alphas_cumprod[:-1]])
        self.betas = 1 - alphas_cumprod / previous
        self.cumprod, self.previous = alphas_cumprod, previous
        variance = self.betas * (1 - previous) / (1 - alphas_cumprod)
        self.log_clipped = torch.cat([variance[1:2], variance[1:]]).log()

    def mean(self, x0, x, t):
        first = self.betas * self.previous.sqrt() / (1 - self.cumprod)
        alphas = 1 - self.betas
        second = (1 - self.previous) * alphas.sqrt() / (1 - self.cumprod)
        return first[t, None, None, None] * x0 + second[t, None, None, None] * x

    def bits(self, x0, x, x0_hat, fraction, t):
        low = self.log_clipped[t, None, None, None]
        high = self.betas.log()[t, None, None, None]
        log_variance = fraction * high + (1 - fraction) * low
        mean, guess = self.mean(x0, x, t), self.mean(x0_hat, x, t)
        kl = 0.5 * (
            -1
            + log_variance
            - low
            + torch.exp(low - log_variance)
            + (mean - guess) ** 2 * torch.exp(-log_variance)
        )
        nll = -self.log_likelihood(x0, guess, 0.5 * log_variance)
        kl, nll = (value.mean((1, 2, 3)) / math.log(2) for value in (kl, nll))
        return torch.where(t == 0, nll, kl)

    @staticmethod
    def log_likelihood(x, means, log_scales):
        def cdf(value):  # the published code uses a tanh within 2e-4 of this
            return 0.5 * (1 + torch.erf(value / math.sqrt(2)))

        centered = x - means
        inverse = torch.exp(-log_scales)
        plus, minus = cdf(inverse * (centered + 1 / 255)), cdf(inverse * (centered - 1 / 255))
        inside = (plus - minus).clamp(min=1e-12).log()
        upper = (1 - minus).clamp(min=1e-12).log()
        middle = torch.where(x > 0.999, upper, inside)
        return torch.where(x < -0.999, plus.clamp(min=1e-12).log(), middle)


def example(index, n=6, seed=0):
    """Makes clean images (both ends included), noisy ones, an estimate and a variance, float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 2, 3, 3)
    x0 = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    x0[:, :, 0, 0], x0[:, :, 0, 1] = -1, 1
    eps, error, fraction = (torch.randn(shape, generator=generator).double() for _ in range(3))
    index = torch.as_tensor(index).expand(n)
    level = SCHEDULE((index + 1).double() / STEPS)
    return index, level, x0, add_noise(x0, eps, level), x0 + 0.01 * error, fraction.sigmoid()


@pytest.mark.parametrize("index", [FIRST, 1, 2, 50, LAST, [0, 1, 5, 30, 70, 99]])
def test_it_is_the_published_bound(index):
    """Compares with guided-diffusion's bits per dimension in float64, first step included."""
    t, level, x0, x, x0_hat, fraction = example(torch.tensor(index))
    alphas_cumprod = SCHEDULE(torch.arange(1, STEPS + 1).double() / STEPS).alpha ** 2
    expected = Published(alphas_cumprod).bits(x0, x, x0_hat, fraction, t)
    bits = BOUND(x, x0, Estimate(x0_hat, fraction), level, SCHEDULE)
    torch.testing.assert_close(bits, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("index", [FIRST, 1, LAST])
def test_float32_is_enough(index):
    _, level, x0, x, x0_hat, fraction = example(index)
    exact = BOUND(x, x0, Estimate(x0_hat, fraction), level, SCHEDULE)
    x, x0, *estimate = (v.float() for v in (x, x0, x0_hat, fraction))
    single = BOUND(x, x0, Estimate(*estimate), level, SCHEDULE)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-3, atol=1e-4)


def test_the_likelihoods_of_all_bins_add_up_to_one():
    bins = torch.arange(256).double() / 127.5 - 1
    for mean in (-1.2, 0.013, 0.97):
        log_variance = torch.full((256,), math.log(0.05**2)).double()
        nats = negative_log_likelihood(bins, torch.full_like(bins, mean), log_variance)
        assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_weights_are_those_of_the_hybrid_loss():
    assert Hybrid().weight == 0.001
    _, level, x0, x, x0_hat, fraction = example(7)
    bits = BOUND(x, x0, Estimate(x0_hat, fraction), level, SCHEDULE)
    added = Hybrid(0.01)(x, x0, Estimate(x0_hat, fraction), level, SCHEDULE)
    torch.testing.assert_close(added, 0.01 * STEPS * bits)


class Affine(torch.nn.Module):
    """A network with one parameter for each half of its output."""

    condition_width = 1

    def __init__(self, in_channels, out_channels, image_size):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(0.3))
        self.variance = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x, noise, condition):
        return torch.cat([self.value * x, self.variance * x], 1)


@pytest.mark.parametrize("prediction", [Eps(), V()])
def test_only_the_variance_learns_from_the_bound(prediction):
    denoiser = Denoiser(Affine, Unconditional, prediction, (2, 3, 3), 0, learned_variance=True)
    _, level, x0, _, _, _ = example(torch.tensor([0, 1, 5, 30, 70, 99]))
    eps = torch.randn_like(x0)

    def gradients(objective):
        denoiser.zero_grad()
        loss_at(objective, denoiser, x0, eps, level).mean().backward()
        network = denoiser.backbone
        return network.value.grad.clone(), network.variance.grad

    simple, none = gradients(Objective(SCHEDULE, prediction, UniformTime(), Denoising()))
    hybrid, variance = gradients(
        Objective(SCHEDULE, prediction, UniformTime(), Denoising(variance=Hybrid()))
    )
    assert none == 0
    assert torch.equal(simple, hybrid)
    assert variance.abs() > 0


def test_its_optimum_is_the_log_of_the_expected_loss():
    """For gamma-distributed losses of known mean, u is log E[L] at every level to 0.1."""
    torch.manual_seed(0)
    schedule, head = VarianceExploding(), LearnedUncertainty(64)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)

    def mean(level):
        log_sigma = level.sigma.log()
        return (0.3 * log_sigma + (0.8 * log_sigma).sin() - 1).exp().float()

    for step in range(600):
        level = schedule(torch.rand(256, dtype=torch.float64))
        losses = mean(level) * torch.distributions.Gamma(4.0, 4.0).sample((256,))
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / 600)
        u = head(level)
        optimizer.zero_grad()
        (losses * (-u).exp() + u).mean().backward()
        optimizer.step()
    level = schedule(torch.linspace(0.02, 0.98, 50))
    error = (head(level) - mean(level).log()).abs()
    assert error.max() < 0.1
    assert (mean(level).log().max() - mean(level).log().min()) > 2, "not a flat line to learn"


def test_it_starts_as_the_plain_loss():
    head = LearnedUncertainty()
    assert len(head.weight) == 128
    level = Cosine()(torch.linspace(0, 1, 5))
    assert torch.equal(head(level), torch.zeros(5))


@pytest.mark.parametrize("schedule", [Rectified(), Cosine(), VarianceExploding()])
def test_it_is_finite_at_both_ends(schedule):
    head = LearnedUncertainty()
    nn.init.ones_(head.weight)
    u = head(schedule(torch.tensor([0.0, 0.5, 1.0])))
    u.sum().backward()
    assert u.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_its_features_tell_levels_apart_and_have_unit_mean_square():
    head = LearnedUncertainty(512)
    level = Cosine()(torch.linspace(0.05, 0.95, 19))
    features = torch.stack(
        [torch.autograd.grad(head(level)[i], head.weight)[0] for i in range(len(level))]
    )
    assert (features.square().mean(1) - 1).abs().max() < 0.05
    products = features @ features.T / 512
    assert products[0, 1:].max() < 0.9
    assert products[0, -1].abs() < 0.2  # levels far apart are unrelated


def test_it_is_float32_under_autocast_and_with_bfloat16_weights():
    head, level = LearnedUncertainty(), Cosine()(torch.linspace(0.1, 0.9, 5))
    nn.init.normal_(head.weight)
    exact = head(level)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(level), exact)
    rounded = head.bfloat16()(level)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.2


class Zero(nn.Module):
    """Output 0, so that the loss is the mean square of the target."""

    self_conditioning = False
    clip = None
    conditioning = Unconditional(Classes.numbered(0), 0)

    def forward(self, x, level, given=NOTHING):
        return Estimate(x, None, torch.zeros_like(x))


def test_training_divides_by_it_and_the_reported_loss_does_not():
    x0 = torch.linspace(-1, 1, 64).reshape(16, 1, 2, 2)
    plain = Objective(Rectified(), X0(), UniformTime(), Denoising())
    learned = Objective(
        Rectified(), X0(), UniformTime(), Denoising(uncertainty=LearnedUncertainty())
    )
    nn.init.normal_(learned.loss.uncertainty.weight)
    losses = plain(Zero(), x0, generator=torch.Generator().manual_seed(0))
    level, _ = plain.time_sampler(16, Rectified(), torch.Generator().manual_seed(0))
    u = learned.loss.uncertainty(level)
    divided = learned(Zero(), x0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(divided.minimised, losses.minimised / u.exp() + u)
    eps = torch.randn(16, 1, 2, 2)
    assert torch.equal(
        loss_at(plain, Zero(), x0, eps, level), loss_at(learned, Zero(), x0, eps, level)
    )


def test_its_gradient_comes_from_the_loss():
    objective = Objective(
        Rectified(), Flow(), LogitNormal(), Denoising(uncertainty=LearnedUncertainty())
    )
    objective(Zero(), torch.zeros(8, 1, 2, 2)).minimised.mean().backward()
    assert objective.loss.uncertainty.weight.grad.abs().sum() > 0
