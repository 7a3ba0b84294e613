"""State spaces whose step, input and output depend on the token: S6, and its dual SSD.

B batch, N tokens, E channels, S states, h heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.scan import dual_macs, selective_scan, state_space_dual
from diffusion_lab.common.ranges import ranges, whole

RANK_DIVISOR = 32  # rank of the steps is channels / 32: Mamba's D / 16
SHORTEST, LONGEST = 1e-3, 0.1  # initial steps: memories of a thousand tokens down to ten


def initial_step(count: int) -> Tensor:
    """Draws numbers that softplus turns into `count` log-uniform steps, SHORTEST to LONGEST."""
    step = torch.empty(count).uniform_(math.log(SHORTEST), math.log(LONGEST)).exp()
    return step + torch.log(-torch.expm1(-step))


def at_least_float32(x: Tensor) -> Tensor:
    """Converts x to float32 at least, whatever autocast says: decays multiply over all tokens."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class S6(nn.Module):
    """A state of S numbers for each channel, each with its own decay (arXiv:2312.00752)."""

    @ranges(state=whole(1))
    def __init__(self, channels: int, state: int = 16):
        super().__init__()
        self.state = state
        self.rank = math.ceil(channels / RANK_DIVISOR)
        self.project = nn.Linear(channels, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.log_decay = nn.Parameter(torch.empty(channels, state))
        self.skip = nn.Parameter(torch.empty(channels))

    def initialise(self) -> None:
        """Starts with decay rates 1 to S, and steps of many lengths."""
        rates = torch.arange(1, self.state + 1, device=self.log_decay.device).log()
        self.log_decay.data.copy_(rates.expand_as(self.log_decay))
        nn.init.ones_(self.skip)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        self.dt_proj.bias.data.copy_(initial_step(len(self.dt_proj.bias)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        low, b, c = self.project(x).split([self.rank, self.state, self.state], dim=-1)
        dt = F.softplus(at_least_float32(self.dt_proj(low)))
        channels, b, c = (at_least_float32(tensor) for tensor in (x, b, c))
        y = selective_scan(channels, dt, -at_least_float32(self.log_decay).exp(), b, c)
        return torch.addcmul(y, channels, self.skip).to(x.dtype)

    def mixing_macs(self, x: Tensor) -> int:
        """Half of the scan's 9 operations a token, channel and state."""
        return 9 * x.numel() * self.state // 2


class SSD(nn.Module):
    """One decay per head, and a state of S x `head_channels` (arXiv:2405.21060).

    Inputs and outputs are projected from the scan's own input, as in S6; Mamba-2's block takes them
    from the token, and normalises the gated result.
    """

    @ranges(state=whole(1), head_channels=whole(1))
    def __init__(self, channels: int, state: int = 64, head_channels: int = 64):
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels={head_channels} must divide the {channels} inner channels"
            )
        self.state = state
        self.heads = channels // head_channels
        self.project = nn.Linear(channels, self.heads + 2 * state, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.log_decay = nn.Parameter(torch.empty(self.heads))
        self.skip = nn.Parameter(torch.empty(self.heads))

    def initialise(self) -> None:
        """Starts with decay rates from 1 to 16, and steps of many lengths."""
        self.log_decay.data.uniform_(1, 16).log_()
        nn.init.ones_(self.skip)
        self.dt_bias.data.copy_(initial_step(self.heads))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        projected = at_least_float32(self.project(x))
        dt, b, c = projected.split([self.heads, self.state, self.state], dim=-1)
        heads = at_least_float32(x).unflatten(-1, (self.heads, -1))  # (B, N, h, E / h)
        dt = F.softplus(dt + self.dt_bias)
        y = state_space_dual(heads, dt, -at_least_float32(self.log_decay).exp(), b, c)
        return torch.addcmul(y, heads, self.skip[:, None]).flatten(2).to(x.dtype)

    def mixing_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of the scan's matrix products."""
        batch, length, channels = x.shape
        return batch * dual_macs(length, channels, self.state)
