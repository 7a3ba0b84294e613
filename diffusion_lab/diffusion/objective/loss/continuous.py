"""Consistency in continuous time: the estimate of x0 stays along the path, by its derivative."""

import torch
from torch import nn

from diffusion_lab.common.ranges import Count, Positive, ranges
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast
from diffusion_lab.diffusion.objective.loss.base import Loss, mean_square, weighed
from diffusion_lab.diffusion.objective.loss.mean_flow import along_path, rates, slope_of_output
from diffusion_lab.diffusion.objective.loss.uncertainty import LearnedUncertainty


class ContinuousConsistency(nn.Module, Loss):
    """|F - F*|^2, where F* moves F so that dx0_hat/dt becomes 0 (sCM, arXiv:2410.11081).

    x0_hat = k(t) F + ... of the network's output F, and F* = F + g / (|g| + `floor`) without a
    gradient, with the tangent g = -k'(t) dx0_hat/dt / (alpha'^2 + sigma'^2) and the root of its
    mean square as |g|. On the path of cosine and sine, predicting v, g is the paper's. What g has
    besides the error of the denoised estimate grows from 0 over `warmup_images` images. A
    learned `uncertainty` weighs levels.
    """

    of_samples = forward_mode = differentiates_time = True
    extra_passes = 1.0  # the derivative

    @ranges()
    def __init__(
        self,
        warmup_images: Count = 1_280_000,
        floor: Positive = 0.1,
        uncertainty: LearnedUncertainty | None = None,
    ):
        super().__init__()
        self.warmup_images = warmup_images
        self.floor = floor
        self.uncertainty = uncertainty

    def __call__(self, parts, denoiser, x0, eps, level, given, generator):
        x, zero = add_noise(x0, eps, level), torch.zeros_like(level.alpha)
        d_alpha, d_sigma = rates(parts.schedule, level)
        velocity = broadcast(d_alpha, x) * x0 + broadcast(d_sigma, x) * eps
        clean = NoiseLevel(zero, zero + 1, zero)  # a jump there ends at x0_hat
        output, drift = along_path(parts, denoiser, x, velocity, level, clean, given)
        slope = broadcast(slope_of_output(parts.schedule, parts.prediction, level, clean), x)
        denoised = slope * (output - parts.prediction.target(x0, eps, level))
        share = min(1.0, parts.images_seen / self.warmup_images)
        tangent = -slope * torch.lerp(denoised, drift, share).detach()
        tangent = tangent / broadcast(d_alpha**2 + d_sigma**2, x)
        size = mean_square(tangent).sqrt()
        target = output.detach() + tangent / broadcast(size + self.floor, x)
        return weighed(mean_square(output - target.detach()), level, self.uncertainty)
