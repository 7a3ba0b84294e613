"""The feature likelihood divergence: how likely samples make test images (arXiv:2302.04440).

The density of features is a mixture of Gaussians N(g_j, s_j I) around the m samples g_j. Their
variances s_j maximise the likelihood of the training images, so a copy of a training image gets a
variance near 0 and makes no test image likely. n training images, D features.
"""

import math

import torch
from torch import Tensor

from diffusion_lab.common.messages import track
from diffusion_lab.common.randomness import random_places
from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.neighbours import square_distances
from diffusion_lab.metrics.observer import ImageSet
from diffusion_lab.metrics.quantity import named

MOST = 10_000  # samples, as published
PAIRS = 6 * 10**8  # of a sample and a training image, 2.4 GB
BLOCK = 500  # training images at a time
ITERATIONS = 20  # of expectation maximisation, which changes little after the first few
NEAREST = 1e-3  # added to squared distances before the fit, as published
SMALLEST = math.exp(-40)  # variance of a copy
FEWEST = 1e-6  # images from which a variance is computed
NEARER = 0.9  # a floor of the density is a Gaussian around the mean, at this share of the distance


def fitted(centres: Tensor, images: Tensor, description: str) -> Tensor:
    """The variances (m,), float32, of Gaussians of equal weight around centres (m, D).

    They are fitted to images (n, D) by expectation maximisation. Meanwhile, a broad Gaussian around
    the images' mean is added to the density, so that images far from all centres do not widen any.
    """
    blocks, dim = images.split(BLOCK), images.shape[1]
    squares = [square_distances(block, centres).float() for block in blocks]
    nearest = torch.stack([each.amin(0) for each in squares]).amin(0)
    variances, floor = (nearest + NEAREST) / dim, torch.tensor(1.0)
    far = NEARER**2 * (images - images.mean(0)).square().sum(1)
    for _ in track(range(ITERATIONS), description):
        shares, spreads = torch.zeros_like(variances), torch.zeros_like(variances)
        broad, broad_spread = torch.zeros(2)
        for each, beyond in zip(squares, far.split(BLOCK), strict=True):
            near = log_density(each, variances, dim) - math.log(len(centres))
            wide = log_density(beyond, floor, dim)
            whole = torch.logaddexp(near.logsumexp(1), wide)
            part, rest = (near - whole[:, None]).exp(), (wide - whole).exp()
            shares += part.sum(0)
            spreads += (part * each).sum(0)
            broad += rest.sum()
            broad_spread += (rest * beyond).sum()
        # a Gaussian without images keeps its variance
        own = (spreads / (dim * shares)).clamp(min=SMALLEST)
        variances = torch.where(shares > FEWEST, own, variances)
        floor = torch.where(broad > FEWEST, broad_spread / (dim * broad), floor)
    return variances


def surprise(images: Tensor, centres: Tensor, variances: Tensor) -> float:
    """The mean negative log-likelihood of images (k, D) by these Gaussians, nats per dimension."""
    dim, found = images.shape[1], []
    for block in images.split(BLOCK):
        near = log_density(square_distances(block, centres).float(), variances, dim)
        found.append(near.logsumexp(1) - math.log(len(centres)))
    return -torch.cat(found).double().mean().item() / dim


def log_density(squares: Tensor, variance: Tensor, dim: int) -> Tensor:
    """The log-density of a Gaussian in `dim` dimensions at squared distances from its mean."""
    return -squares / (2 * variance) - dim / 2 * (2 * math.pi * variance).log()


def fld(generated: Tensor, training: Tensor, unseen: Tensor) -> float:
    """The divergence of features (m, D), (n, D) and (k, D): in hundredths of a nat per dimension.

    It is the surprise of unseen images under the samples' density, above that under a density
    around training images, fitted to the others: about 0 for samples as good as real images.
    Features are shifted and scaled to mean 0 and standard deviation 1 over the unseen images.
    """
    mean, std = unseen.mean(0), unseen.std(0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    samples, known, new = ((each - mean) / std for each in (generated, training, unseen))
    variances = fitted(samples, known, "Fitting FLD to training images")
    order, count = random_places(len(known), None), min(len(samples), len(known) // 2)
    some, others = known[order[:count]], known[order[count:]]
    best = surprise(new, some, fitted(some, others, "Fitting FLD without samples"))
    return 100 * (surprise(new, samples, variances) - best)


class FLD(Metric):
    """The feature likelihood divergence (arXiv:2302.04440), which also grows with copies.

    It takes at most 10,000 samples, and as many training images as 6e8 pairs allow.
    """

    quantities = named("fld")

    def results(self, generated: ImageSet, reference: ImageSet, suffix: str = "") -> Values:
        samples = generated.select(slice(MOST))
        known = reference.select(slice(PAIRS // len(samples)))
        return super().results(samples, known, suffix)

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        if reference.unseen is None:  # the samples are themselves test images
            return {}
        return {"fld": fld(generated.features, reference.features, reference.unseen)}
