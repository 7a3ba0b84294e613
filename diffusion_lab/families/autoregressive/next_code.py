"""The loss of a model that predicts codes one after another: their negative log-likelihood."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from diffusion_lab.common.ranges import Fraction, between, settings
from diffusion_lab.families.autoregressive.transformer import CodeTransformer


@settings
class NextCode:
    """Cross-entropy of each code, given those before it.

    A label is dropped with probability `label_dropout`, so that guidance can leave it out.
    `smoothing` spreads this share of a code's probability over all values, in training alone.
    """

    label_dropout: Fraction = 0.1
    smoothing: Annotated[float, between(0, 0.5)] = 0.0

    def __call__(self, model: CodeTransformer, codes: Tensor, labels: Tensor) -> Tensor:
        """The loss of codes (B, N) int64 with labels (B,), in nats of a code, ()."""
        labels = model.conditioning.drop(labels, self.label_dropout)
        return nats(model, codes, labels, self.smoothing).mean()


def nats(
    model: CodeTransformer, codes: Tensor, labels: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    """The negative log-likelihood of each code (B, N), exact without smoothing, in nats."""
    logits = model(codes[:, :-1], labels)
    return F.cross_entropy(logits.mT, codes, reduction="none", label_smoothing=smoothing)
