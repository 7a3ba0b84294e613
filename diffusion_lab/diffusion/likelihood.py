"""Log-likelihood of images by the probability-flow ODE (arXiv:2011.13456, section D.2).

log p(x0) = log p(noise) + the integral of the divergence along the path from x0 to its noise.
"""

import math

import torch
from torch import Tensor

from diffusion_lab.diffusion.estimate import DenoiseFn
from diffusion_lab.diffusion.sampler.runge_kutta import angular_slope, end_angles, integrate
from diffusion_lab.diffusion.schedule import NoiseSchedule

GREY_STEP = 1 / 127.5  # distance of neighbouring uint8 values of images in [-1, 1]


def exact_divergence(slope: Tensor, z: Tensor) -> Tensor:
    """The trace of d slope / d z, (B,): a backward pass for each of the D numbers of a sample."""
    traces = (
        torch.autograd.grad(column.sum(), z, retain_graph=True)[0].flatten(1)[:, i]
        for i, column in enumerate(slope.flatten(1).unbind(1))
    )
    return sum(traces, start=z.new_zeros(len(z)))


def estimated_divergence(slope: Tensor, z: Tensor, probe: Tensor) -> Tensor:
    """Hutchinson's estimate probe^T (d slope / d z) probe of the trace, (B,), in one pass."""
    return (torch.autograd.grad((slope * probe).sum(), z)[0] * probe).flatten(1).sum(1)


def log_likelihood(
    denoise: DenoiseFn,
    x0: Tensor,
    schedule: NoiseSchedule,
    probe: Tensor | None = None,
    tolerance: float = 1e-4,
    steps: int = 1000,
) -> Tensor:
    """log p(x0) in nats, (B,) float64, of clean images x0 (B, ...).

    The trace is exact without a `probe`, and Hutchinson's estimate with one, which is of x0's shape
    and has entries +-1. The noise at t = 1 is taken for exactly Gaussian. `denoise` must be
    differentiable in x. Raises ValueError if `steps` steps do not reach the tolerance.
    """
    clean, noisy = end_angles(schedule)
    slope, numbers = angular_slope(denoise, schedule), x0[0].numel()

    @torch.enable_grad()
    def augmented(state: Tensor, angle: Tensor) -> Tensor:
        z = state[:, :-1].reshape(x0.shape).to(x0.dtype).requires_grad_()
        dz = slope(z, angle)
        trace = exact_divergence(dz, z) if probe is None else estimated_divergence(dz, z, probe)
        return torch.cat([dz.flatten(1), trace[:, None]], 1).detach().double()

    z = x0.double().flatten(1) * math.cos(clean)  # (B, D)
    state = torch.cat([z, z.new_zeros(len(z), 1)], 1)
    # near clean data the slope changes within an angle as small as the first, and the trace is one
    # number beside all pixels
    for there, _ in integrate(augmented, state, clean, noisy, tolerance, steps, clean, alone=1):
        state = there
    z, trace = state[:, :-1], state[:, -1]
    std = math.sin(noisy)
    prior = -(z / std).square().sum(1) / 2 - numbers * math.log(std * math.sqrt(2 * math.pi))
    return prior + trace + numbers * math.log(math.cos(clean))


def bits_per_dim(log_likelihood: Tensor, numbers: int) -> Tensor:
    """Converts nats of images in [-1, 1] with uniform noise of a step to bits per uint8 number.

    `numbers` is C x H x W. Such noise makes the density's mean a bound on the bytes' probability.
    """
    return -log_likelihood / (numbers * math.log(2)) - math.log2(GREY_STEP)
