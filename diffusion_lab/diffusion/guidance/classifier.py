"""Guidance by a classifier of clean images: x0 + scale sigma^2 / alpha grad log p(label | x0)."""

from dataclasses import replace

import torch
from torch import Tensor

from diffusion_lab.common.ranges import settings
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Estimate, Given
from diffusion_lab.diffusion.guidance.base import Ask, Guidance, LabelLikelihood, asking
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast


@settings
class ClassifierGuidance(Guidance):
    """Classifier guidance (arXiv:2105.05233), by the class of the estimate x0 (arXiv:2302.07121).

    The score of images with a label is that of all images plus the gradient in x of
    log p(label | x), so x0 moves by sigma^2 / alpha times the gradient; here the probability is
    that of the estimate x0 of x, which is differentiated, too: a backward pass through the network
    at each call. Scale 0 is the model itself, and 1 Bayes' rule for such a probability. Pure noise
    tells no classes apart, and is not guided.
    """

    by_classifier = True

    classifier: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weak_run is not None:
            raise ValueError("weak_run has no part in guidance by a classifier; write null")

    @property
    def uses_weak(self) -> bool:
        return False

    @property
    def uses_strong(self) -> bool:
        return True

    def ask(
        self,
        denoiser: Denoiser,
        labels: Tensor | None,
        weak: Denoiser | None,
        classifier: LabelLikelihood | None,
    ) -> Ask:
        if self.scale == 0:
            return asking(denoiser, labels)
        if classifier is None or labels is None:
            raise ValueError("classifier needs its function, and every sample a label")
        return classified(self, denoiser, labels, classifier)


def classified(
    guidance: Guidance, denoiser: Denoiser, labels: Tensor, classifier: LabelLikelihood
) -> Ask:
    """Moves x0 along the gradient in x of the label's log-probability given x0."""
    plain = asking(denoiser, labels)

    def ask(x: Tensor, level: NoiseLevel, previous: Tensor | None) -> Estimate:
        inside = guidance.inside(level) & (level.alpha > 0)
        if not inside.any():
            return plain(x, level, previous)
        # copies, since tensors made in inference mode have no gradients
        with torch.inference_mode(False), torch.enable_grad():
            free, own = x.clone().detach().requires_grad_(), labels.clone()
            values = {name: getattr(level, name).clone() for name in ("t", "alpha", "sigma")}
            given = Given(own, None if previous is None else previous.clone())
            estimate = denoiser(free, replace(level, **values), given)
            (slope,) = torch.autograd.grad(classifier(estimate.x0, own).sum(), free)
        strong, weight = estimate.x0.detach(), estimate.log_variance_weight
        # pure noise beside other levels: 0 in place of a division by 0
        gain = guidance.scale * (level.sigma**2 / level.alpha).where(inside, 0)
        x0 = guidance.settled(strong + broadcast(gain, x) * slope, strong, inside)
        return Estimate(x0, None if weight is None else weight.detach())

    return ask
