"""A Gaussian mixture, for which the denoised estimate and the exact ODE path are known.

For x0 ~ sum_k w_k N(m_k, s^2), E[x0 | x] mixes, by the modes' responsibilities for x,
E[x0 | x, k] = m_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (x - alpha m_k).
"""

import torch
from torch import Tensor

from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, noise_of
from diffusion_lab.diffusion.objective import Prediction


def like(x: Tensor, level: NoiseLevel) -> NoiseLevel:
    """The level, ready to multiply x (B, ...) in its dtype."""
    return NoiseLevel(*(broadcast(each, x) for each in (level.t, level.alpha, level.sigma)))


class GaussianMixture:
    """A mixture with weights (K,), means (K, D), and one std for every mode and axis."""

    def __init__(self, weights: list[float], means: list, std: float):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        if self.means.ndim == 1:
            self.means = self.means[:, None]
        self.std = std

    def denoise(self, x: Tensor, level: NoiseLevel) -> Estimate:
        """The estimate E[x0 | x] for x (B, ...) with D numbers per sample, at a scalar level."""
        flat = x.flatten(1).double()[:, None]  # (B, 1, D)
        alpha, sigma = level.alpha.item(), level.sigma.item()
        variance = alpha**2 * self.std**2 + sigma**2
        residual = flat - alpha * self.means  # (B, K, D)
        logits = self.weights.log() - residual.square().sum(-1) / (2 * variance)
        modes = self.means + alpha * self.std**2 / variance * residual  # (B, K, D)
        x0 = (logits.softmax(-1)[..., None] * modes).sum(1)
        return Estimate(x0.to(x.dtype).reshape(x.shape))

    def sample(self, n: int) -> Tensor:
        """Draws n clean samples (n, D), float64, from the global generator."""
        modes = torch.multinomial(self.weights, n, replacement=True)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64)
        return self.means[modes] + self.std * noise

    def cdf(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The probability P(x_t < x) of a one-dimensional mixture at a scalar level."""
        variance = level.alpha**2 * self.std**2 + level.sigma**2
        scores = (x - level.alpha * self.means[:, 0]) / variance.sqrt()  # (B, K)
        return (self.weights * torch.special.ndtr(scores)).sum(-1, keepdim=True)

    def transport(self, x: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
        """The exact end of the probability-flow ODE for x (B, 1), which keeps ranks in 1-D."""
        rank = self.cdf(x, here)
        low, high = torch.full_like(x, -1e3), torch.full_like(x, 1e3)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle, there) < rank
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def through(prediction: Prediction, denoise: DenoiseFn) -> DenoiseFn:
    """Makes the same estimate through the output of a perfect network with this prediction."""

    def denoise_by_output(x: Tensor, level: NoiseLevel) -> Estimate:
        x0 = denoise(x, level).x0
        output = prediction.target(x0, noise_of(x, x0, level), level)
        return Estimate(prediction.to_x0(output, x, level))

    return denoise_by_output
