"""A time sampler that learns which noise levels have a large loss."""

from typing import ClassVar

import torch
from torch import Tensor

from diffusion_lab.common.ranges import ranges, share, whole
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.objective.time_sampler.base import Gather, TimeSampler
from diffusion_lab.diffusion.schedule import NoiseSchedule


class SecondMoment(TimeSampler):
    """Draws more where the loss is large, and undoes this by weights (arXiv:2102.09672).

    Each of `bins` equal parts of (0, 1] gets a share in proportion to the root mean square of its
    last `history` losses; the share `uniform` is spread evenly, as is everything until every part
    has its history.
    """

    rules: ClassVar[Rules] = {
        "learns from losses at the levels that it draws, and jumps have two; write "
        "objective/time_sampler=logit_normal": lambda time_sampler, loss: loss.two_levels,
    }
    history: Tensor
    count: Tensor

    @ranges(bins=whole(2), history=whole(1), uniform=share())
    def __init__(
        self,
        bins: int = 100,
        history: int = 10,
        uniform: float = 0.001,
        stratified: bool = False,
    ):
        super().__init__(stratified)
        self.uniform = uniform
        self.register_buffer("history", torch.zeros(bins, history))  # a ring for each part
        self.register_buffer("count", torch.zeros(bins, dtype=torch.int64))  # losses ever seen

    def probabilities(self) -> Tensor:
        """The share of draws that each part gets, (bins,) float64."""
        bins, history = self.history.shape
        rms = self.history.double().square().mean(1).sqrt()
        learned = (1 - self.uniform) * rms / rms.sum() + self.uniform / bins
        known = (self.count >= history).all() & (rms.sum() > 0)
        return torch.where(known, learned, torch.full_like(learned, 1 / bins))

    def part_of(self, t: Tensor) -> Tensor:
        """The index (n,) of the part of (0, 1] in which t (n,) lies."""
        bins = len(self.count)
        # t may be a table's point on the upper edge of its part, give or take a rounding
        return (t * bins - 1e-6).floor().long().clamp(0, bins - 1)

    def quantile(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        share = self.probabilities()
        u = u.to(share.device)
        index = torch.searchsorted(share.cumsum(0), u).clamp(max=len(share) - 1)
        inside = (u - (share.cumsum(0) - share)[index]) / share[index]
        return (index + inside.clamp(0, 1)) / len(share)

    def importance(self, t: Tensor) -> Tensor:
        share = self.probabilities()
        return (1 / (len(share) * share[self.part_of(t)])).float()

    def observe(self, t: Tensor, losses: Tensor, gather: Gather | None = None) -> None:
        if gather is not None:
            t, losses = gather(t), gather(losses)
        bins, history = self.history.shape
        part = self.part_of(t)
        hits = (part[:, None] == torch.arange(bins, device=part.device)).long()  # (n, bins)
        new = hits.sum(0)
        place = hits.cumsum(0).gather(1, part[:, None])[:, 0] - 1  # among the hits of its part
        slot = (self.count[part] + place) % history
        # losses that this very call would overwrite go to a spare column: a GPU writes in any
        # order, and selecting the others would wait for it
        slot = torch.where(place < new[part] - history, history, slot)
        ring = torch.cat([self.history, torch.zeros_like(self.history[:, :1])], 1)
        ring[part, slot] = losses.to(ring.dtype)
        self.history.copy_(ring[:, :history])
        self.count += new
