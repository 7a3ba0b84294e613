"""A generator, unit noise to an image in one call, and its loss (arXiv:2501.05441, 1807.00734).

B batch, Z numbers of noise, E width of the embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_lab.assembly.pipeline import Generator
from diffusion_lab.backbone.base import initialise
from diffusion_lab.backbone.discriminator import Discriminator
from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.backbone.resample import Upsample
from diffusion_lab.backbone.stage import PixelResidual
from diffusion_lab.backbone.unet import check_levels
from diffusion_lab.common.images import require_finite, to_uint8
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.common.ranges import MULTIPLE_OF_4, Count, at_least, ranges, whole_list


class ConvGenerator(nn.Module):
    """The decoder of a U-Net, from noise instead of skips.

    `multipliers` times `channels` is the width of each level, finest first, which has `blocks`
    residual blocks; noise and label modulate each of them. Raises ValueError for an image that is
    too small for the levels.
    """

    @ranges()
    def __init__(
        self,
        image_shape: tuple[int, int, int],
        labels: Labels,
        conditioning: Callable[..., nn.Module],
        channels: Annotated[int, MULTIPLE_OF_4],
        multipliers: Annotated[Sequence[int], whole_list(1, shortest=1)],
        blocks: Count,
        latent_size: Count,
    ):
        super().__init__()
        image_channels, *sides = image_shape
        check_levels((sides[0], sides[1]), len(multipliers), ())
        self.latent_size = latent_size
        embedding = 4 * channels
        self.embed = nn.Sequential(
            nn.Linear(latent_size, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        width = channels * multipliers[-1]
        factor = 2 ** (len(multipliers) - 1)
        self.coarsest = (width, sides[0] // factor, sides[1] // factor)
        self.start = nn.Linear(embedding, width * self.coarsest[1] * self.coarsest[2])
        self.blocks = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks):
                wider = channels * multipliers[level]
                self.blocks.append(PixelResidual(width, wider, embedding, 0.0, scale_shift=True))
                width = wider
            if level:
                self.blocks.append(Upsample(width))
        self.norm = GroupNorm(width, silu=True)
        self.out = nn.Conv2d(width, image_channels, 3, padding=1)
        initialise(self)
        # after the others, as it initialises itself
        self.conditioning: Any = conditioning(labels=labels, width=embedding)

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.blocks]

    def forward(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Unit noise (B, Z), and labels (B,) -> images (B, C, H, W) float32, about in [-1, 1]."""
        vector = self.embed(noise)
        own = self.conditioning(labels, len(noise)).vector
        embedding = F.silu(vector if own is None else vector + own)
        x = self.start(embedding).unflatten(1, self.coarsest)
        if x.device.type == "cpu":  # faster convolutions; elsewhere the layout is the caller's
            x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, embedding) if isinstance(block, PixelResidual) else block(x)
        return self.out(self.norm(x)).float()


@dataclass(frozen=True)
class GANPipeline(Generator):
    """A generator; sample i is fixed by `seed` and i alone, up to the network's rounding."""

    model: ConvGenerator

    @property
    def known(self) -> Labels | None:
        conditioning = self.model.conditioning
        return conditioning.labels if conditioning.conditional else None

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        device = next(self.model.parameters()).device
        noise = SampleNoise(seed, ids, device)((self.model.latent_size,))
        images = self.model(noise, None if labels is None else labels.to(device))
        on_step()
        return to_uint8(require_finite(images))


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
        """The discriminator's loss of each image, (B,), without penalties; log 2 is chance."""
        judged = [self.discriminator(each, labels) for each in (real, fake)]
        return F.softplus(judged[1] - judged[0]).flatten(1).mean(1)
