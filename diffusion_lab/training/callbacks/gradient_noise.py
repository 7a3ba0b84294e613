"""The gradient noise scale: how many images a batch needs before more of them say little new.

    tr(S) / |G|^2, with G the mean and S the covariance of the gradients of single images

(arXiv:1812.06162, appendix A.1). The squared norm of the gradient of b images is |G|^2 + tr(S) / b
on average, so those of a batch and of its equal parts give both unknowns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

KEPT = 0.9  # share of the earlier estimates in an average, at each new one


class GradientNoise:
    """Averages of tr(S) and |G|^2 over the steps that are measured; a single step says little."""

    def __init__(self) -> None:
        self.noise = self.signal = 0.0  # averages of tr(S) and |G|^2, up to a common factor

    def observe(self, part: float, batch: float, part_size: int, batch_size: int) -> None:
        """Adds a step by squared norms: of the gradients of parts, on average, and of the batch.

        The sizes are in images.
        """
        noise = (part - batch) / (1 / part_size - 1 / batch_size)
        signal = (batch_size * batch - part_size * part) / (batch_size - part_size)
        self.noise = KEPT * self.noise + (1 - KEPT) * noise
        self.signal = KEPT * self.signal + (1 - KEPT) * signal

    @property
    def scale(self) -> float | None:
        """The noise scale in images; None where noise still hides the gradient."""
        return self.noise / self.signal if min(self.noise, self.signal) > 0 else None


class PartNorms:
    """Adds up the squared gradient norms of this rank's micro-batches, before ranks share them."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.total = torch.zeros((), device=parameters[0].device)
        self.active = False  # a loss may take gradients of its own, outside of the backward pass
        self._hooks = [each.register_hook(self._add) for each in parameters]

    def _add(self, gradient: Tensor) -> None:
        if self.active:
            self.total += gradient.detach().float().square().sum()

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
