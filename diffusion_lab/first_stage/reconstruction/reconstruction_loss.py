"""The loss of autoencoders: error + perceptual + bottleneck + adversary (arXiv:2012.09841).

Images are (B, C, H, W) in [-1, 1]; every term is in units of the mean error of a pixel.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_lab.common.ranges import flag, one_of, ranges
from diffusion_lab.first_stage.reconstruction.discriminator import PatchDiscriminator
from diffusion_lab.first_stage.reconstruction.perceptual import Perceptual

ERRORS = {"l1": torch.abs, "l2": torch.square}
LARGEST_WEIGHT = 1e4  # limit of the adversary's weight, as its gradient may vanish


class ReconstructionLoss(nn.Module):
    """A reconstruction loss; `error` is l1 or l2, and `discriminator` a factory given the channels.

    With `calibrated` the error is a likelihood, log(scale) + error / scale up to constants, whose
    scale is the batch's own error (the optimal sigma-VAE, arXiv:2006.13202). A VAE needs this if
    its prior is to be sampled.
    """

    @ranges(error=one_of(*ERRORS), calibrated=flag())
    def __init__(
        self,
        image_channels: int,
        error: str,
        calibrated: bool,
        perceptual: Perceptual | None,
        discriminator: Callable[[int], PatchDiscriminator] | None,
    ):
        super().__init__()
        self.error = error
        self.calibrated = calibrated
        self.perceptual = perceptual  # frozen, and no nn.Module
        self.discriminator = discriminator(image_channels) if discriminator else None

    @torch.no_grad()
    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError if one of the loss's networks cannot take images of shape (C, H, W)."""
        images = torch.zeros(2, *image_shape)
        if self.perceptual is not None:
            try:
                self.perceptual(images, images)
            except RuntimeError as error:
                raise ValueError(
                    f"perceptual cannot take images of shape {image_shape}; choose "
                    "efficientnet_lite0 for small images, and none unless they have 1 or 3 channels"
                ) from error
        if self.discriminator is not None:
            try:
                self.discriminator(images)
            except RuntimeError as error:
                raise ValueError(
                    f"discriminator has too many layers for images of shape {image_shape}; use "
                    "fewer, or choose none"
                ) from error

    def forward(
        self, images: Tensor, outputs: Tensor, bottleneck: Tensor, last_weight: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss () to minimise in all parameters, and its parts by name.

        The adversary is weighted by gradients at `last_weight`, the decoder's last weight.
        """
        loss = error = ERRORS[self.error](outputs - images).mean()
        parts = {self.error: error, "bottleneck": bottleneck}
        if self.calibrated:
            # the likelihood of Gaussian or Laplace noise of the likeliest scale, the error itself
            loss = (0.5 if self.error == "l2" else 1.0) * error.log()
        if self.perceptual is not None:
            distance = self.perceptual(outputs, images).mean()
            loss = loss + self.perceptual.weight * distance
            parts["perceptual"] = distance
        judge = self.discriminator
        if judge is None:
            return loss + bottleneck, parts
        if step < judge.start:
            # adds 0 but uses every parameter, which several processes wait for
            silence = sum(parameter.sum() for parameter in judge.parameters())
            return loss + bottleneck + 0.0 * silence, parts
        frozen = {name: value.detach() for name, value in judge.named_parameters()}
        fooled = -functional_call(judge, frozen, (outputs,)).mean()
        weight = judge.weight * adaptive_weight(loss, fooled, last_weight)
        found = hinge(judge(images), judge(outputs.detach()))
        parts |= {"adversarial": fooled, "adversarial_weight": weight, "discriminator": found}
        return loss + bottleneck + weight * fooled + found, parts

    def drop_discriminator_gradients(self, step: int) -> None:
        """Drops a silent adversary's zero gradients, so that weight decay does not shrink it."""
        if self.discriminator is not None and step < self.discriminator.start:
            for parameter in self.discriminator.parameters():
                parameter.grad = None


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """The ratio of the two losses' gradients at the decoder's last layer (arXiv:2012.09841), ()."""
    norms = [
        torch.autograd.grad(each, last_weight, retain_graph=True)[0].norm()
        for each in (loss, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=LARGEST_WEIGHT).detach()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss (), from its judgements of real and reconstructed images."""
    return ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
