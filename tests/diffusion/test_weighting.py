"""Weights of the x0 error, and the weights that follow for outputs of each prediction type."""

import math

import pytest
import torch

from diffusion_lab.diffusion.objective import EDM, Eps, Flow, Score, V
from diffusion_lab.diffusion.objective.loss import (
    P2,
    SNR,
    EDMWeight,
    MinSNR,
    SigmoidWeight,
    SoftMinSNR,
    TruncatedSNR,
    VelocityWeight,
)
from diffusion_lab.diffusion.schedule import Cosine, Rectified, VarianceExploding


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
