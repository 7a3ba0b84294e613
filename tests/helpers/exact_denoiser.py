"""A Gaussian mixture, for which the denoised estimate and the exact ODE path are known.

For x0 ~ sum_k w_k N(m_k, s^2), E[x0 | x] mixes, by the modes' responsibilities for x,
E[x0 | x, k] = m_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (x - alpha m_k).
"""

import torch
from torch import Tensor

from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, noise_of
from diffusion_lab.diffusion.objective import Prediction

CLEAN = NoiseLevel(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))  # t, alpha, sigma


def like(x: Tensor, level: NoiseLevel) -> NoiseLevel:
    """The level, ready to multiply x (B, ...) in its dtype."""
    return NoiseLevel(*(broadcast(each, x) for each in (level.t, level.alpha, level.sigma)))


class GaussianMixture:
    """A mixture with weights (K,), means (K, D), and one std for every mode and axis.

    Means (K,) are the same on every axis, of which there may be any number.
    """

    def __init__(self, weights: list[float], means: list, std: float):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        if self.means.ndim == 1:
            self.means = self.means[:, None]
        self.std = std

    def denoise(self, x: Tensor, level: NoiseLevel) -> Estimate:
        """The estimate E[x0 | x] for x (B, ...) with D numbers per sample, at levels () or (B,)."""
        residual, alpha, variance = self.around(x.flatten(1).double(), level)
        logits = self.weights.log()[:, None] - residual.square().sum(-1, True) / (2 * variance)
        modes = self.means + alpha * self.std**2 / variance * residual  # (B, K, D)
        x0 = (logits.softmax(1) * modes).sum(1)
        return Estimate(x0.to(x.dtype).reshape(x.shape))

    def around(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, ...]:
        """The way (B, K, D) from each mode to x (B, D), alpha, and the variance of the modes.

        The latter two are numbers for a level (), and (B, 1, 1) for levels (B,).
        """
        alpha, sigma = (
            each.item() if each.ndim == 0 else each[:, None, None]
            for each in (level.alpha, level.sigma)
        )
        return x[:, None] - alpha * self.means, alpha, alpha**2 * self.std**2 + sigma**2

    def sample(self, n: int) -> Tensor:
        """Draws n clean samples (n, D), float64, from the global generator."""
        modes = torch.multinomial(self.weights, n, replacement=True)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64)
        return self.means[modes] + self.std * noise

    def cdf(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The probability P(x_t < x), x (B, 1), of a one-dimensional mixture."""
        residual, _, variance = self.around(x, level)
        return (self.weights[:, None] * torch.special.ndtr(residual / variance**0.5)).sum(1)

    def density(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The derivative of `cdf` with respect to x."""
        residual, _, variance = self.around(x, level)
        bells = (-residual.square() / (2 * variance)).exp() / (2 * torch.pi * variance) ** 0.5
        return (self.weights[:, None] * bells).sum(1)

    def transport(self, x: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
        """The exact end of the probability-flow ODE for x (B, 1), which keeps ranks in 1-D.

        It is differentiable once, by the last step of Newton's method.
        """
        rank = self.cdf(x, here)
        low, high = torch.full_like(x, -1e3), torch.full_like(x, 1e3)
        for _ in range(26):  # to 2e-5, which each step of Newton squares
            middle = (low + high) / 2
            below = self.cdf(middle, there) < rank
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        found = (low + high) / 2
        for _ in range(2):
            found = found.detach()
            found = found - (self.cdf(found, there) - rank) / self.density(found, there).detach()
        return found


def through(prediction: Prediction, denoise: DenoiseFn) -> DenoiseFn:
    """Makes the same estimate through the output of a perfect network with this prediction."""

    def denoise_by_output(x: Tensor, level: NoiseLevel) -> Estimate:
        x0 = denoise(x, level).x0
        output = prediction.target(x0, noise_of(x, x0, level), level)
        return Estimate(prediction.to_x0(output, x, level))

    return denoise_by_output
