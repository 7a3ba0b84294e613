"""How a code is drawn from logits, and how logits are guided. B batch, K values of a code."""

from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.common.ranges import Number, Positive, optional, settings, share, whole


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
