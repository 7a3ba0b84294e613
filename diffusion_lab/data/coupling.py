"""Couplings: which noise is mixed with which image of a batch, in x = alpha x0 + sigma eps.

Independent pairs cross each other's paths, which a network can only average; pairs of least total
distance cross less, so the paths of the trained model are straighter.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffusion_lab.common.ranges import Flag, settings


@settings
class OptimalTransport:
    """Pairs of least total squared distance (arXiv:2302.00482, 2304.14772), exactly.

    With `per_class` only images of one label exchange their noise, so that the noise of a label
    stays Gaussian, as it is when a sample of that label is drawn. Without, it does not.
    """

    per_class: Flag = True

    def __call__(self, x0: Tensor, eps: Tensor, labels: Tensor | None) -> Tensor:
        """The order (B,) int64 of eps (B, ...) that pairs it with x0 (B, ...)."""
        # |x0 - eps|^2 without its squares, which all pairings share; autocast leaves float64 alone
        cost = -(x0.flatten(1).double() @ eps.flatten(1).double().T)  # (B, B)
        if labels is None or labels.ndim > 1 or not self.per_class:
            labels = cost.new_zeros(len(x0))
        # in one copy, for which the host waits: the assignment is made there
        cost, parts = torch.cat([cost, labels[:, None]], dim=1).cpu().split([len(x0), 1], dim=1)
        parts = parts[:, 0]
        order = torch.empty(len(x0), dtype=torch.int64)
        for part in parts.unique():
            (own,) = (parts == part).nonzero(as_tuple=True)
            _, partners = linear_sum_assignment(cost[own][:, own].numpy())
            order[own] = own[torch.from_numpy(partners)]
        return order.to(x0.device, non_blocking=True)
