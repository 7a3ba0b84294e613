"""The training loss: the papers' formulas, and stored values of a tiny denoiser."""

import math
from functools import partial

import pytest
import torch
from helpers.exact_map import MIXTURE, deviation, every_path, points
from helpers.measured import loss_at
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

VE = VarianceExploding()
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


def images_noise_and_levels(schedule):
    eps = torch.randn(16, 1, 2, 2, dtype=torch.float64)
    return batch().double(), eps, schedule(torch.linspace(0.05, 0.95, 16))


def test_without_a_weighting_it_is_the_squared_error_of_the_output():
    objective = PRESETS["flow_matching"]()
    x0, eps, level = images_noise_and_levels(objective.schedule)
    t = level.t[:, None, None, None]
    output = 0.3 * ((1 - t) * x0 + t * eps) + 0.1 * t
    expected = (output - (eps - x0)).square().mean((1, 2, 3))
    losses = loss_at(objective, Linear(Flow()), x0, eps, level)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("c", [0.00054, 0.03, 10.0])
def test_pseudo_huber_is_the_papers(c):
    """Compares with section 3.3 of arXiv:2310.14189, where the norm is that of a whole sample."""
    objective, denoiser = PRESETS["flow_matching"](loss=Denoising(huber=c)), Linear(Flow())
    x0, eps, level = images_noise_and_levels(objective.schedule)
    output = denoiser(add_noise(x0, eps, level), level).output
    square, whole = (output - (eps - x0)).square().sum((1, 2, 3)), c * 4**0.5
    expected = ((square + whole**2).sqrt() - whole) / 4**0.5
    losses = loss_at(objective, denoiser, x0, eps, level)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("prediction", [Eps(), X0(), V(), Flow(), EDM(), Score(), Score(False)])
def test_a_weighted_loss_is_of_the_error_of_x0_for_every_prediction(prediction):
    x0, eps, level = images_noise_and_levels(Cosine())
    denoiser = Linear(prediction)
    error = (denoiser(add_noise(x0, eps, level), level).x0 - x0).square().mean((1, 2, 3))
    snr = (level.alpha / level.sigma) ** 2
    for huber, expected in ((None, error), (0.1, (error + 0.01).sqrt() - 0.1)):
        loss = Denoising(MinSNR(5.0), huber=huber)
        objective = Objective(Cosine(), prediction, UniformTime(), loss)
        losses = loss_at(objective, denoiser, x0, eps, level)
        torch.testing.assert_close(losses, snr.clamp(max=5) * expected)


@pytest.mark.parametrize("prediction", [Flow(), V(), X0(), EDM()])
def test_a_clipped_estimate_has_no_error_beyond_a_limit_that_the_data_is_at(prediction):
    objective = Objective(Cosine(), prediction, UniformTime(), Denoising())
    x0, eps, level = images_noise_and_levels(objective.schedule)
    x0 = x0.clamp(-0.2, 0.2)  # some values are at each limit
    losses = loss_at(objective, Linear(prediction, clip=0.2), x0, eps, level)
    estimate = Linear(prediction)(add_noise(x0, eps, level), level)
    error = estimate.output - prediction.target(x0, eps, level)
    exact = ((x0 == 0.2) & (estimate.x0 >= 0.2)) | ((x0 == -0.2) & (estimate.x0 <= -0.2))
    assert 0 < exact.double().mean() < 1
    expected = torch.where(exact, 0, error).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected)
    assert (losses < loss_at(objective, Linear(prediction), x0, eps, level)).any()


BLACK_OR_GREY = torch.tensor([-1.0] * 7 + [0.6] * 3).reshape(10, 1, 1, 1)  # -0.52 on average


def loss_of_one_value(value, loss, clip=None, x0=BLACK_OR_GREY):
    """The mean loss of a network that predicts the same x0 for all images."""

    def denoiser(*_):
        output = torch.full_like(x0, value)
        return Estimate(output.clamp(-1, 1), None, output)

    denoiser.clip = clip
    objective = Objective(Rectified(), X0(), UniformTime(), loss)
    level = Rectified()(torch.ones(len(x0)))
    return loss_at(objective, denoiser, x0, torch.zeros_like(x0), level).mean().item()


def test_pseudo_huber_is_exact_for_tiny_errors_and_moves_the_best_estimate_to_the_median():
    assert pseudo_huber(torch.tensor(1e-12), 1.0).item() == pytest.approx(5e-13)
    for c, expected in ((0.001, -1), (100.0, -0.52)):  # the median, and the mean
        key = partial(loss_of_one_value, loss=Denoising(huber=c))
        best = min(torch.linspace(-1.5, 1, 251).tolist(), key=key)
        assert best == pytest.approx(expected, abs=0.02)


def test_clipping_does_not_move_the_best_estimate():
    loss, black = partial(loss_of_one_value, loss=Denoising(), clip=1.0), BLACK_OR_GREY[:7]
    best = min(torch.linspace(-2, 1, 301).tolist(), key=loss)
    assert best == pytest.approx(-0.52, abs=0.011)
    assert loss(-1.3, x0=black) == loss(-1.0, x0=black) == 0
    assert loss(-0.9, x0=black) == pytest.approx(0.01)
    assert loss(-1.3, x0=black, clip=None) == pytest.approx(0.09)


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
    plain, labelled = Linear(Flow()), Linear(Flow(), ClassLabel(Classes.numbered(10), 4))
    found = [
        objective(denoiser, batch(), given, seeded()).minimised
        for denoiser, given in (
            (plain, Given()),
            (plain, Given(torch.arange(16))),
            (labelled, Given()),
        )
    ]
    assert all(torch.equal(each, found[0]) for each in found)


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
    loss = Denoising(uncertainty=LearnedUncertainty())
    objective = Objective(Rectified(), V(), SecondMoment(bins=2, history=2), loss)
    # known losses make the importance differ from 1, and u from 0
    objective.time_sampler.observe(torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([3.0, 3, 1, 1]))
    torch.nn.init.ones_(objective.loss.uncertainty.weight)
    told = []
    objective.time_sampler.observe = lambda *arguments: told.append(arguments)
    twice = lambda values: values.repeat(2)  # noqa: E731
    share = BatchShare(gather=twice)
    objective(Linear(V()), batch().requires_grad_(), generator=seeded(), share=share)
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
    loss = Denoising(uncertainty=LearnedUncertainty())
    learning = Objective(Rectified(), V(), SecondMoment(), loss)
    assert set(learning.state_dict()) == {
        "time_sampler.history",
        "time_sampler.count",
        "loss.uncertainty.weight",
    }


@every_path
def test_the_best_contrastive_output_is_moved_away_from_the_mean_target(parts):
    prediction = parts.prediction
    x0, eps, level, _ = points(parts.schedule, count=40_000)
    x = add_noise(x0, eps, level)
    mean = MIXTURE.denoise(x, level).x0
    own = prediction.target(mean, noise_of(x, mean, level), level)
    others = prediction.target((MIXTURE.weights @ MIXTURE.means).expand_as(x), 0 * x, level)
    error = torch.zeros_like(x, requires_grad=True)

    def best(x, level, given):
        return Estimate(mean, None, (own - 0.2 * others) / 0.8 + error)

    best.clip = None
    found = Contrastive(0.2)(parts, best, x0, eps, level, NOTHING, None)
    (update,) = torch.autograd.grad(found.minimised.sum(), error)
    for feature in (torch.ones_like(x), x, level.t[:, None]):
        assert abs(deviation(update * feature)) < 3.5
    assert update.std() > 0.1
    plain = Denoising()(parts, best, x0, eps, level, NOTHING, None)
    torch.testing.assert_close(found.observed[1], plain.minimised.detach())


def test_what_is_clamped_and_exact_is_not_pushed_away_from_other_samples():
    parts = Parts(Rectified(), Flow(), UniformTime())
    x0 = torch.tensor([[1.0, -1.0, 0.3], [-1.0, -1.0, 1.0]])
    eps = torch.tensor([[0.1, 0.2, 0.3], [-0.2, 0.4, -0.1]])
    level = Rectified()(torch.tensor([0.5, 0.5]))
    output = torch.tensor([[-8.0, 8.0, -0.4], [8.0, 8.0, 8.0]], requires_grad=True)

    def clamped(x, level, given):
        return Estimate(Flow().to_x0(output, x, level).clamp(-1, 1), None, output)

    clamped.clip = 1.0
    found = Contrastive(0.2)(parts, clamped, x0, eps, level, NOTHING, None)
    (update,) = torch.autograd.grad(found.minimised.sum(), output)
    expected = torch.zeros(2, 3)  # but where an estimate is inside, or at the wrong limit
    for image, place in ((0, 2), (1, 2)):
        own, other = ((eps - x0)[each, place] for each in (image, 1 - image))
        out = output[image, place].item()
        expected[image, place] = 2 / 3 * ((out - own) - 0.2 * (out - other))
    torch.testing.assert_close(update, expected)


def test_min_snr_is_capped_at_gamma():
    snr = torch.tensor([0.0, 0.25, 4.0, 5.0, 6.0, math.inf], dtype=torch.float64)
    assert MinSNR()(snr.log()).tolist() == pytest.approx([0, 0.25, 4, 5, 5, 5])
    assert MinSNR(2.0)(snr.log()).tolist() == pytest.approx([0, 0.25, 2, 2, 2, 2])


def plain(snr, sigma):
    """The weight of a loss that has none."""
    return torch.ones_like(snr)


def k_diffusions(std):
    return lambda snr, sigma: (sigma * std / (sigma**2 + std**2)) ** 2


def edms(std):
    """The weight of x0, which is 1 on EDM's outputs (arXiv:2206.00364)."""
    return lambda snr, sigma: (sigma**2 + std**2) / (sigma * std) ** 2


PUBLISHED = [  # weights of the squared error of the network's output
    (MinSNR(5.0), Eps(), Cosine(), lambda snr, sigma: snr.clamp(max=5) / snr),
    (MinSNR(5.0), V(), Cosine(), lambda snr, sigma: snr.clamp(max=5) / (snr + 1)),
    (SNR(), Eps(), Cosine(), plain),
    (SNR(), Score(), Cosine(), plain),
    (SNR(), Score(scale_by_sigma=False), Cosine(), lambda snr, sigma: sigma**2),  # of NCSN
    (TruncatedSNR(), X0(), Cosine(), lambda snr, sigma: snr.clamp(min=1)),  # arXiv:2202.00512
    (SoftMinSNR(), EDM(0.5), VE, k_diffusions(0.5)),
    (SoftMinSNR(0.6162**-2), EDM(0.6162), VE, k_diffusions(0.6162)),
    (P2(), Eps(), Cosine(), lambda snr, sigma: 1 / (1 + snr)),  # arXiv:2204.00227
    (P2(0.5, 1.0), Eps(), Cosine(), lambda snr, sigma: (1 + snr) ** -0.5),
    (P2(0.0, 2.0), Eps(), Cosine(), plain),
    (P2(1.0, 0.3), Eps(), Cosine(), lambda snr, sigma: 1 / (0.3 + snr)),
    (EDMWeight(), X0(), VE, edms(0.5)),
    (EDMWeight(), EDM(0.5), VE, plain),
    (EDMWeight(0.7), X0(), VE, edms(0.7)),
    (EDMWeight(0.7), EDM(0.7), VE, plain),
    # lower on clean data (arXiv:2303.00848)
    (SigmoidWeight(), Eps(), Cosine(), lambda snr, sigma: 1 / (1 + snr * math.e)),
    (SigmoidWeight(2.0), Eps(), Cosine(), lambda snr, sigma: 1 / (1 + snr * math.exp(-2))),
    (VelocityWeight(0.01), Flow(), Rectified(), plain),
    (VelocityWeight(0.01), Flow(), Cosine(), plain),
]


@pytest.mark.parametrize(("weighting", "prediction", "schedule", "published"), PUBLISHED)
def test_a_weight_on_outputs_is_the_published_one(weighting, prediction, schedule, published):
    level = schedule(torch.linspace(0.05, 0.95, 19))
    weight = weighting(level.logsnr) * prediction.x0_gain(level) ** 2
    torch.testing.assert_close(weight, published((level.alpha / level.sigma) ** 2, level.sigma))


def test_soft_min_snr_has_min_snr_at_both_ends():
    far = torch.tensor([-30.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(SoftMinSNR(5.0)(far), MinSNR(5.0)(far))
    middle = torch.tensor(math.log(5.0), dtype=torch.float64)
    assert SoftMinSNR(5.0)(middle).item() == pytest.approx(2.5)


def test_velocity_weight_stops_at_its_smallest_sigma():
    level = Rectified()(torch.tensor([0.001, 0.04, 0.05, 0.06]))
    weight = VelocityWeight()(level.logsnr)  # of JiT's clipped denominators
    torch.testing.assert_close(weight, level.sigma.clamp(min=0.05) ** -2, rtol=1e-6, atol=0)


def test_weights_are_finite_and_not_negative_down_to_pure_noise():
    logsnr = torch.tensor([-math.inf, -20.0, 0.0, 20.0], dtype=torch.float64)
    for weighting in {type(each[0]) for each in PUBLISHED}:
        weight = weighting()(logsnr)
        assert weight.isfinite().all()
        assert weight.min() >= 0
        assert weight.dtype == torch.float64
    assert TruncatedSNR()(logsnr)[0] == 1


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

    def bits(self, x0, x, estimate, t):
        x0_hat, fraction = estimate.x0, estimate.log_variance_weight
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


def example(index):
    """Makes clean images (both ends included), noisy ones, an estimate and a variance, float64."""
    generator, shape = seeded(), (6, 2, 3, 3)
    x0 = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    x0[:, :, 0, 0], x0[:, :, 0, 1] = -1, 1
    eps, error, fraction = (torch.randn(shape, generator=generator).double() for _ in range(3))
    level = SCHEDULE((torch.as_tensor(index).expand(6) + 1).double() / STEPS)
    estimate = Estimate(x0 + 0.01 * error, fraction.sigmoid())
    return level, x0, add_noise(x0, eps, level), estimate


@pytest.mark.parametrize("index", [FIRST, 1, 2, 50, LAST, [0, 1, 5, 30, 70, 99]])
def test_it_is_the_published_bound(index):
    """Compares with guided-diffusion's bits per dimension in float64, first step included."""
    level, x0, x, estimate = example(index)
    alphas_cumprod = SCHEDULE(torch.arange(1, STEPS + 1).double() / STEPS).alpha ** 2
    expected = Published(alphas_cumprod).bits(x0, x, estimate, torch.as_tensor(index).expand(6))
    bits = BOUND(x, x0, estimate, level, SCHEDULE)
    torch.testing.assert_close(bits, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("index", [FIRST, 1, LAST])
def test_float32_is_enough(index):
    level, x0, x, estimate = example(index)
    exact = BOUND(x, x0, estimate, level, SCHEDULE)
    rounded = Estimate(estimate.x0.float(), estimate.log_variance_weight.float())
    single = BOUND(x.float(), x0.float(), rounded, level, SCHEDULE)
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
    level, x0, x, estimate = example(7)
    bits = BOUND(x, x0, estimate, level, SCHEDULE)
    added = Hybrid(0.01)(x, x0, estimate, level, SCHEDULE)
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
    level, x0, *_ = example([0, 1, 5, 30, 70, 99])
    eps = torch.randn_like(x0)

    def gradients(loss):
        denoiser.zero_grad()
        objective = Objective(SCHEDULE, prediction, UniformTime(), loss)
        loss_at(objective, denoiser, x0, eps, level).mean().backward()
        network = denoiser.backbone
        return network.value.grad.clone(), network.variance.grad

    simple, none = gradients(Denoising())
    hybrid, variance = gradients(Denoising(variance=Hybrid()))
    assert none == 0
    assert torch.equal(simple, hybrid)
    assert variance.abs() > 0


def test_its_optimum_is_the_log_of_the_expected_loss():
    """For gamma-distributed losses of known mean, u is log E[L] at every level to 0.1."""
    torch.manual_seed(0)
    schedule, head = VarianceExploding(), LearnedUncertainty(64)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)
    gamma = torch.distributions.Gamma(4.0, 4.0)

    def mean(level):
        log_sigma = level.sigma.log()
        return (0.3 * log_sigma + (0.8 * log_sigma).sin() - 1).exp().float()

    for step in range(600):
        level = schedule(torch.rand(256, dtype=torch.float64))
        losses = mean(level) * gamma.sample((256,))
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


def test_training_divides_by_it_and_the_reported_loss_does_not():
    x0, uncertainty, denoiser = batch(), LearnedUncertainty(), Linear(X0())
    nn.init.normal_(uncertainty.weight)
    plain, learned = (
        Objective(Rectified(), X0(), UniformTime(), loss)
        for loss in (Denoising(), Denoising(uncertainty=uncertainty))
    )
    losses = plain(denoiser, x0, generator=seeded())
    level, _ = plain.time_sampler(16, Rectified(), seeded())
    u = uncertainty(level)
    divided = learned(denoiser, x0, generator=seeded())
    torch.testing.assert_close(divided.minimised, losses.minimised / u.exp() + u)
    eps = torch.randn(16, 1, 2, 2)
    assert torch.equal(*(loss_at(each, denoiser, x0, eps, level) for each in (plain, learned)))


def test_its_gradient_comes_from_the_loss():
    uncertainty = LearnedUncertainty()
    objective = PRESETS["flow_matching"](loss=Denoising(uncertainty=uncertainty))
    objective(Linear(Flow()), torch.zeros(8, 1, 2, 2)).minimised.mean().backward()
    assert uncertainty.weight.grad.abs().sum() > 0
