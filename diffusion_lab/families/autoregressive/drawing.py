"""Draws images code by code, from seeds and labels to uint8 images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from diffusion_lab.common.images import require_finite
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.common.ranges import Number, Positive, optional, settings, share, whole
from diffusion_lab.families.autoregressive.transformer import CodeTransformer
from diffusion_lab.first_stage import TrainedVQ
from diffusion_lab.pipeline import LabelledGenerator


@settings
class CodeSampler:
    """Draws codes at a temperature, of the `top_k` likeliest, or of the fewest with mass `top_p`.

    (arXiv:1805.04833, 1904.09751.) With both limits, the mass is that among the `top_k`.
    """

    temperature: Positive = 1.0
    top_k: Annotated[int | None, optional(whole(1))] = None
    top_p: Annotated[float | None, optional(share())] = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, K) -> the probabilities to draw with, (B, K) float64."""
        logits, order = (logits.double() / self.temperature).sort(dim=1, descending=True)
        if self.top_k is not None:
            logits[:, self.top_k :] = -torch.inf
        p = logits.softmax(dim=1)
        if self.top_p is not None:
            before = p.cumsum(dim=1) - p  # the mass of likelier codes
            p = p.masked_fill(before >= self.top_p, 0.0)
            p = p / p.sum(dim=1, keepdim=True)
        return torch.zeros_like(p).scatter(1, order, p)

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Draws a code for each row of logits (B, K) by a uniform number (B,); (B,) int64."""
        total = self.probabilities(logits).cumsum(dim=1)
        # the last number may be 1, and a sum a little below it
        chosen = torch.searchsorted(total, (uniform.double() * total[:, -1])[:, None], right=True)
        return chosen[:, 0].clamp(max=logits.shape[1] - 1)


@settings
class LogitGuidance:
    """Classifier-free guidance on logits, l + (scale - 1)(l - l without the label).

    (arXiv:2207.12598, 2306.17806.) A scale of 1 is none.
    """

    scale: Number = 1.0

    @property
    def needs_labels(self) -> bool:
        """Whether logits with the label and without it both count."""
        return self.scale != 1

    asks_unlabelled = needs_labels

    def __call__(self, strong: Tensor, weak: Tensor) -> Tensor:
        """The guided logits, of the shape of logits with and without the label."""
        return weak + self.scale * (strong - weak)


@dataclass(frozen=True)
class CodePipeline(LabelledGenerator):
    """A model of codes, the way to draw from it, and the first stage that decodes them.

    Sample i is fixed by `seed` and i alone, up to the network's rounding.
    """

    model: CodeTransformer
    sampler: CodeSampler
    guidance: LogitGuidance
    first_stage: TrainedVQ
    kind: Labels

    @property
    def conditioning(self) -> Any:
        return self.model.conditioning

    @property
    def steps(self) -> int:
        return self.model.tokens

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        codes = self.codes(ids, seed, labels, on_step)
        return self.first_stage.from_codes(codes.unflatten(1, self.first_stage.latent_shape[1:]))

    def codes(
        self,
        ids: Sequence[int],
        seed: int,
        labels: Tensor | None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws the codes of samples `ids`, (B, N) int64."""
        model = self.model
        device = model.start.device
        labels = None if labels is None else labels.to(device)
        guided = self.guidance.scale != 1
        if guided and labels is not None:
            labels = torch.cat([labels, model.conditioning.labels.null(len(labels), device)])
        # normal numbers, each a uniform one by its distribution function
        uniform = torch.special.ndtr(SampleNoise(seed, ids)((model.tokens,)).double())
        codes = torch.empty(len(ids), 0, dtype=torch.int64, device=device)
        # the cache grows from call to call, and a compiled block would be compiled for each
        with torch.compiler.set_stance("force_eager"), model.remembering():
            for place in range(model.tokens):
                known = codes[:, -1:].repeat(2, 1) if guided else codes[:, -1:]
                logits = model(known, labels, begun=place)[:, -1]
                if guided:
                    logits = self.guidance(*logits.chunk(2))
                # on the CPU, as a GPU's sums along an axis depend on its kind
                drawn = self.sampler(require_finite(logits).cpu(), uniform[:, place]).to(device)
                codes = torch.cat([codes, drawn[:, None]], dim=1)
                on_step()
        return codes
