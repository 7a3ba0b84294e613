"""The sampling call of a diffusion model, from seeds and labels to uint8 images."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_lab.assembly.pipeline.generator import Generator
from diffusion_lab.common.images import require_finite
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.randomness import SampleNoise, mix_seed
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import DenoiseFn, Estimate
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise, broadcast
from diffusion_lab.diffusion.sampler import Sampler
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.metrics.extractor import Classifier

PAIRS = 0x7061697273  # separates these draws from others with the same seed


@dataclass(frozen=True)
class Pipeline(Generator):
    """A denoiser with everything else that sampling needs.

    Sample i is fixed by `seed` and i alone: its label comes in turn, and its noise does not depend
    on the batch size or on the rank that draws it.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    sampler: Sampler
    guidance: Guidance
    first_stage: FirstStage
    kind: Labels
    weak: Denoiser | None = None  # the denoiser of guidance.weak_run
    classifier: Classifier | None = None  # the one that guides
    # wraps the function that the sampler calls to denoise, as inpainting does
    constrain: Callable[[DenoiseFn], DenoiseFn] = lambda denoise: denoise

    @property
    def known(self) -> Labels | None:
        conditioning = self.denoiser.conditioning
        if conditioning.conditional:
            return conditioning.labels
        return self.kind if self.guidance.by_classifier else None

    @property
    def steps(self) -> int:
        return self.sampler.steps

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        noise = SampleNoise(seed, ids, self.device)
        denoise = self.bound(labels)
        start = noise(self.denoiser.image_shape)
        x = self.sampler(denoise, start, self.schedule, noise.randn_like, on_step)
        return self.first_stage.decode(require_finite(x))

    @torch.inference_mode()
    def renew(
        self, images: Tensor, labels: Tensor, level: NoiseLevel, ids: Sequence[int], seed: int = 0
    ) -> Tensor:
        """Noises images, uint8 (B, C, H, W), to a scalar level, and lets the sampler denoise them.

        Returns uint8 (B, C, H, W). `labels` (B,) int64 are ignored by an unconditional model. The
        noise of an image depends on `seed` and its id alone. The caller sets autocast.
        """
        noise = SampleNoise(seed, ids, self.device)
        x0 = self.first_stage.encode(images.to(self.device))
        denoise = self.bound(labels if self.conditional else None)
        x = add_noise(x0, noise(x0.shape[1:]), level)
        x = self.sampler.finish(denoise, x, level, self.schedule, noise.randn_like)
        return self.first_stage.decode(require_finite(x))

    @torch.inference_mode()
    def pairs(
        self, ids: Sequence[int], seed: int = 0, on_step: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Draws samples `ids` before they are decoded, and their noise: (B, 2c, h, w) float32.

        The noise is not that of samples with this seed: a student is not measured on its pairs.
        Raises UserError for a sampler that adds noise on the way: its noise has no one sample.
        """

        def refuse(x: Tensor) -> Tensor:
            raise UserError(
                f"{type(self.sampler).__name__} adds fresh noise on its way, so its samples do not "
                "follow from their noise; train the teacher with another sampler, such as unipc"
            )

        noise = SampleNoise(mix_seed(seed, PAIRS), ids, self.device)(self.denoiser.image_shape)
        denoise = self.bound(self.labels(ids))
        samples = self.sampler(denoise, noise, self.schedule, refuse, on_step)
        return torch.cat([require_finite(samples), noise], 1)

    def watched(self, see: Callable[[Tensor, Tensor], None]) -> "Pipeline":
        """A pipeline that draws the same; `see` gets the images of each of the sampler's calls.

        They are the noisy images x / sqrt(alpha^2 + sigma^2) and the estimates of x0 for them,
        (B, c, h, w) each, before they are decoded.
        """

        def constrain(denoise: DenoiseFn) -> DenoiseFn:
            constrained = self.constrain(denoise)

            def ask(x: Tensor, level: NoiseLevel) -> Estimate:
                estimate = constrained(x, level)
                see(x / broadcast((level.alpha**2 + level.sigma**2).sqrt(), x), estimate.x0)
                return estimate

            return ask

        return replace(self, constrain=constrain)

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(self.denoiser.parameters()).device

    def bound(self, labels: Tensor | None) -> DenoiseFn:
        """The function that the sampler calls, for these labels (B,) or none."""
        labels = None if labels is None else labels.to(self.device)
        weak = None if self.weak is None else self.weak.to(self.device)
        classify = self.classifier.log_probability if self.classifier else None
        return self.constrain(self.guidance.bind(self.denoiser, labels, weak, classify))


def with_steps(sampler: Sampler, steps: int) -> Sampler:
    """The sampler with another number of steps."""
    other = copy.copy(sampler)
    other.steps = steps
    return other
