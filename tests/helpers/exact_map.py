"""Jumps along the exact path of a Gaussian mixture in one dimension, for tests of the losses."""

import pytest
import torch
from torch import Tensor

from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import NOTHING, Estimate
from diffusion_lab.diffusion.noise import NoiseLevel, noise_of
from diffusion_lab.diffusion.objective import (
    Flow,
    UniformTime,
    V,
)
from diffusion_lab.diffusion.objective.loss import (
    Parts,
)
from diffusion_lab.diffusion.schedule import Cosine, Linear, Rectified
from helpers.exact_denoiser import CLEAN, GaussianMixture
from helpers.pairs import first_fast

MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], 0.4)
PATHS = {
    "rectified": Parts(Rectified(), Flow(), UniformTime()),
    "cosine": Parts(Cosine(), V(), UniformTime()),
    "linear": Parts(Linear(), V(), UniformTime()),
}
STRAIGHT = PATHS["rectified"]
every_path = pytest.mark.parametrize("parts", PATHS.values(), ids=PATHS)
first_path = pytest.mark.parametrize("parts", first_fast(PATHS.values()), ids=PATHS)


class ExactMap:
    """The denoiser of the mixture that jumps exactly, plus `error` times a function of its input.

    x (B, 1) is float64 and differentiable once.
    """

    conditioning = None
    self_conditioning = False
    clip = None

    def __init__(self, prediction, error=0.0):
        self.prediction = prediction
        self.error = error

    def __call__(self, x: Tensor, level: NoiseLevel, given=NOTHING) -> Estimate:
        there = level.there or level
        ratio = there.sigma / level.sigma
        share = (there.alpha - ratio * level.alpha)[:, None]
        stays = share.abs() < 1e-9
        jumped = MIXTURE.transport(x, level, there) - ratio[:, None] * x
        jumped = jumped / torch.where(stays, 1.0, share)
        x0 = torch.where(stays, MIXTURE.denoise(x, level).x0, jumped)
        x0 = x0 + self.error * (3 * x).sin()
        return Estimate(x0, None, self.prediction.target(x0, noise_of(x, x0, level), level))


def points(schedule, count=512):
    """States x (count, 1) of the mixture, with a start and an end of a jump for each."""
    generator = torch.Generator().manual_seed(1)  # not of the samples, which would depend on t
    draw = torch.rand(2, count, generator=generator, dtype=torch.float64) * 0.96 + 0.02
    here, there = schedule(draw.amax(0)), schedule(draw.amin(0))
    torch.manual_seed(0)
    x0, eps = MIXTURE.sample(count), torch.randn(count, 1, dtype=torch.float64)
    return x0, eps, here, there


def deviation(values: Tensor) -> Tensor:
    """The mean in units of its standard deviation."""
    return values.mean() / values.std() * len(values) ** 0.5


def updates(loss, exact: ExactMap, parts: Parts, count: int) -> Tensor:
    """The gradient of each sample's loss to its own error of the exact map, (B,)."""
    x0, eps, level, _ = points(parts.schedule, count)
    exact.error = torch.zeros(count, 1, dtype=torch.float64, requires_grad=True)
    losses = loss(parts, exact, x0, eps, level, NOTHING, torch.Generator().manual_seed(7))
    return torch.autograd.grad(losses.minimised.sum(), exact.error)[0][:, 0]


class Labelled(ExactMap):
    """The exact map, less 1 where it has no label; class 3 means no label."""

    class conditioning:
        labels = Classes.numbered(3)

    def __call__(self, x: Tensor, level: NoiseLevel, given=NOTHING) -> Estimate:
        estimate = super().__call__(x, level, given)
        return estimate if given.labels is not None else estimate._replace(x0=estimate.x0 - 1)


def assert_order(errors: list[Tensor], low: float, high: float) -> None:
    """Asserts the power of its size by which an error falls where each size is half the last."""
    orders = torch.stack(errors).log2().diff().neg()
    assert ((orders > low) & (orders < high)).all()


class ToClean(ExactMap):
    """A consistency model: its estimate is the exact end of the path on clean data."""

    def __call__(self, x: Tensor, level: NoiseLevel, given=NOTHING) -> Estimate:
        return super().__call__(x, level.towards(spread(CLEAN, len(x))), given)


def spread(level: NoiseLevel, count: int) -> NoiseLevel:
    """A scalar level and the one it goes to, for each of `count` samples."""
    there = None if level.there is None else spread(level.there, count)
    values = (value.expand(count) for value in (level.t, level.alpha, level.sigma))
    return NoiseLevel(*values, there)
