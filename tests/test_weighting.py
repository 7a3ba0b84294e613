"""Weights of the x0 error, and what they are on the outputs of each prediction type."""

import math

import pytest
import torch

from diffusion_lab.objective import Eps, MinSNR, V
from diffusion_lab.schedule import Cosine


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


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match="gamma=0"):
        MinSNR(0)
