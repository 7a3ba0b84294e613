"""R3GAN's loss: a relativistic pair loss, penalised gradients (arXiv:2501.05441, 1807.00734)."""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_lab.backbone.discriminator import Discriminator
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.ranges import at_least, ranges


class RelativisticLoss(nn.Module):
    """The losses of generator and discriminator, by how much more real one image is than another.

    With f(a, b) = softplus(D(b) - D(a)), averaged over pairs of one label, the generator minimises
    f(fake, real) and the discriminator f(real, fake) + gamma / 2 times the squared gradients of D
    in real and in fake images (R1 and R2), summed over pixels and averaged over images. Both are
    minimised in one step, each in its own parameters. Raises ValueError for a discriminator with
    group norms.
    """

    @ranges()
    def __init__(
        self,
        image_channels: int,
        labels: Labels,
        conditioning: Callable[..., nn.Module],
        gamma: Annotated[float, at_least(0)],
        discriminator: Callable[..., Discriminator],
    ):
        super().__init__()
        self.gamma = gamma
        self.discriminator = discriminator(
            image_channels=image_channels, labels=labels, conditioning=conditioning
        )
        if any(isinstance(module, nn.GroupNorm) for module in self.discriminator.modules()):
            raise ValueError(
                "discriminator has group norms, whose gradients cannot be differentiated in "
                "bfloat16, as the penalty needs; write normalised=false for it"
            )

    def forward(
        self, real: Tensor, fake: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum () of both losses for images (B, C, H, W) and their labels, and its parts.

        Its gradient in `fake` is the generator's, that in parameters is the discriminator's.
        """
        judge = self.discriminator
        seen = [each.detach().requires_grad_() for each in (real, fake)]
        of_real, of_fake = (judge(each, labels) for each in seen)
        found = F.softplus(of_fake - of_real).mean()
        per_image = sum(each.flatten(1).mean(1).sum() for each in (of_real, of_fake))
        gradients = torch.autograd.grad(per_image, seen, create_graph=True)
        squares = [each.float().square().flatten(1).sum(1).mean() for each in gradients]
        penalty = self.gamma / 2 * (squares[0] + squares[1])
        frozen = {name: value.detach() for name, value in judge.named_parameters()}
        fooled = F.softplus(
            of_real.detach() - functional_call(judge, frozen, (fake, labels))
        ).mean()
        parts = {
            "generator": fooled,
            "discriminator": found,
            "real_score": of_real.mean(),
            "fake_score": of_fake.mean(),
            "real_gradient": squares[0],
            "fake_gradient": squares[1],
        }
        return fooled + found + penalty, parts

    @torch.no_grad()
    def found(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        """The discriminator's loss of each image without penalties, (B,); log 2 is no better
        than chance."""
        judged = [self.discriminator(each, labels) for each in (real, fake)]
        return F.softplus(judged[1] - judged[0]).flatten(1).mean(1)
