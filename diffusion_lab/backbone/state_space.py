"""State spaces whose step, input and output depend on the token: S6, and its dual SSD.

Their recurrences, h_t = a_t h_{t-1} + b_t, are in plain PyTorch: `selective_scan` is Mamba's, with
a decay for each channel and state (arXiv:2312.00752); `state_space_dual` is Mamba-2's, with one
decay a head, and is made of matrix products (arXiv:2405.21060). B batch, L or N tokens, E channels,
S states, h heads, p = E / h, c tokens a chunk.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from diffusion_lab.common import forward_mode
from diffusion_lab.common.ranges import ranges, whole

# numbers in the states of a block of channels: few stay in a CPU's cache, many keep a GPU busy
BLOCK = {"cpu": 2**18}
LARGE_BLOCK = 2**28
DUAL_CHUNK = 64  # tokens whose pairs are compared at once


def recurrence_(a: Tensor, b: Tensor, backwards: bool = False) -> Tensor:
    """Overwrites b with h_t = a_t h_{t-1} + b_t from h_{-1} = 0; a and b (L, ...), a is destroyed.

    With `backwards` it is h_t = a_t h_{t+1} + b_t from h_L = 0. Chunks of sqrt(L) tokens advance
    together, then each takes over from the one before: about 2 sqrt(L) operations in total.
    """
    length = len(a)
    chunk = math.isqrt(length)
    whole = length - length % chunk
    order = slice(None, None, -1 if backwards else 1)
    _advance(a[:whole].unflatten(0, (-1, chunk)), b[:whole].unflatten(0, (-1, chunk)), order)
    if whole < length:  # a last, shorter chunk
        _advance(a[None, whole:], b[None, whole:], order)
    decays, states = a.split(chunk)[order], b.split(chunk)[order]
    end = slice(0, 1) if backwards else slice(-1, None)
    for i in range(1, len(states)):
        states[i].addcmul_(decays[i], states[i - 1][end])
    return b


def _advance(a: Tensor, b: Tensor, order: slice) -> None:
    """Runs the recurrence in each chunk (n, c, ...); a becomes the decay since a chunk's start."""
    decays, states = a.unbind(1)[order], b.unbind(1)[order]
    for i in range(1, len(states)):
        states[i].addcmul_(decays[i], states[i - 1])
        decays[i].mul_(decays[i - 1])


def exactly(x: Tensor) -> torch.autocast:
    """A context in which products keep the tensors' own type, whatever autocast says."""
    # autocast does not know "meta", where tensors have only shapes
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def _inputs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs (L, B, e, S) of channels: x and dt (L, B, e), a (e, S), b (L, B, S)."""
    return (dt[..., None] * a).exp_(), (dt * x)[..., None] * b[:, :, None]


# Custom operators: one node to torch.compile and to flop counters, whatever is done inside. All
# tensors have the tokens first: x and dt (L, B, E), a (E, S), b and c (L, B, S).


@torch.library.custom_op("diffusion_lab::selective_scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    with exactly(x):
        for e in _blocks(x, a):
            state = recurrence_(*_inputs(x[..., e], dt[..., e], a[e], b))
            y[..., e] = (state @ c[..., None])[..., 0]
    return y


@torch.library.custom_op("diffusion_lab::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Recomputes the states, block by block, instead of keeping them."""
    grad_x, grad_dt, grad_a, grad_b, grad_c = _like(x, dt, a, b, c)
    for e in _blocks(x, a):
        x_e, dt_e, grad_e = x[..., e], dt[..., e], grad[..., e]
        decay, state = _inputs(x_e, dt_e, a[e], b)
        # each state also acts through the next, which decays it
        following = torch.ones_like(decay)
        following[:-1] = decay[1:]
        recurrence_(decay.clone(), state)
        grad_c += (grad_e[:, :, None] @ state)[:, :, 0]
        grad_state = grad_e[..., None] * c[:, :, None]  # (L, B, e, S)
        recurrence_(following, grad_state, backwards=True)
        # through the input dt x b
        grad_b += ((dt_e * x_e)[:, :, None] @ grad_state)[:, :, 0]
        grad_input = (grad_state @ b[..., None])[..., 0]
        grad_x[..., e] = grad_input * dt_e
        grad_dt[..., e] = grad_input * x_e
        # through the decay exp(dt a), whose factor is the state before
        grad_decay = decay[1:].mul_(grad_state[1:]).mul_(state[:-1])
        grad_a[e] = (grad_decay * dt_e[1:, ..., None]).sum((0, 1))
        grad_dt[1:, :, e] += (grad_decay * a[e]).sum(3)
    return grad_x, grad_dt, grad_a, grad_b, grad_c


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _blocks(x: Tensor, a: Tensor) -> list[slice]:
    """Slices the channels of x (L, B, E) into blocks."""
    length, batch, channels = x.shape
    block = BLOCK.get(x.device.type, LARGE_BLOCK)
    size = max(block // (batch * length * a.shape[1]), 1)
    return [slice(i, i + size) for i in range(0, channels, size)]


_scan.register_fake(lambda x, dt, a, b, c: _like(x)[0])
_scan_backward.register_fake(lambda grad, *inputs: _like(*inputs))
_scan.register_autograd(
    lambda ctx, grad: _scan_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@register_flop_formula(torch.ops.diffusion_lab.selective_scan)
def _flops(x, dt, a, *_, **__) -> int:
    return 9 * math.prod(x) * a[1]  # x and a are shapes; 9 is Mamba's own count


@cache
def _cuda_kernel():
    """The kernel of the package mamba-ssm, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_t = c_t . h_t with h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, a state of S for each channel.

    x and dt (B, L, E), a (E, S), b and c (B, L, S), float32 at least -> (B, L, E).
    """
    # the kernel computes in float32, and has no forward-mode derivative
    fits = x.device.type == "cuda" and x.dtype == torch.float32 and not forward_mode.is_taken()
    if fits and (kernel := _cuda_kernel()):
        return kernel(x.mT, dt.mT, a, b.mT, c.mT).mT
    x, dt, b, c = (tensor.transpose(0, 1) for tensor in (x, dt, b, c))
    scan = _plain_scan if forward_mode.is_taken() else _scan
    return scan(x, dt, a, b, c).transpose(0, 1)


def _plain_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan one token after another, in operations that have every derivative."""
    state, outputs = torch.zeros_like(x[0])[..., None] * a, []  # (B, E, S)
    with exactly(x):
        for x_t, dt_t, b_t, c_t in zip(x, dt, b, c, strict=True):
            state = (dt_t[..., None] * a).exp() * state + (dt_t * x_t)[..., None] * b_t[:, None]
            outputs.append((state @ c_t[..., None])[..., 0])
    return torch.stack(outputs)


def state_space_dual(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan with one decay per head, y_i = sum_{j <= i} (c_i . b_j) decay_ij dt_j x_j.

    x (B, L, h, p), dt (B, L, h), a (h,), b and c (B, L, S), all float32 -> (B, L, h, p). Within a
    chunk the sum is a matrix product, in bf16 under autocast like attention, and the chunks before
    it are one state, always in float32.
    """
    length = x.shape[1]
    chunks, size = _dual_chunks(length)
    missing = chunks * size - length  # zeros at the end change nothing before them
    x, dt, b, c = (
        F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing)).unflatten(1, (chunks, size))
        for tensor in (x, dt, b, c)
    )  # (B, n, c, ...)
    x = (x * dt[..., None]).transpose(2, 3)  # (B, n, h, c, p)
    log_decay = (dt * a).movedim(3, 1).cumsum(3)  # (B, h, n, c), since the chunk's start
    within = _decay(log_decay).transpose(1, 2)  # (B, n, h, c, c)
    y = (within * (c @ b.mT)[:, :, None]) @ x
    if chunks > 1:
        whole = log_decay[..., -1:]  # (B, h, n, 1)
        to_end = (whole - log_decay).exp().transpose(1, 2)[..., None]  # (B, n, h, c, 1)
        with exactly(x):
            added = b.mT[:, :, None] @ (x * to_end)  # (B, n, h, S, p), by each chunk alone
            # decay from the end of chunk j to the start of chunk i, over the chunks between
            between = _decay(F.pad(whole[..., 0].cumsum(2), (1, 0)))[..., :-1, 1:]  # (B, h, n, n)
            state = torch.einsum("bhij,bjhsp->bihsp", between, added)  # at each chunk's start
            from_start = log_decay.exp().transpose(1, 2)[..., None]  # (B, n, h, c, 1)
            y = y + from_start * (c[:, :, None] @ state)
    return y.transpose(2, 3).flatten(1, 2)[:, :length]


def _decay(log_decay: Tensor) -> Tensor:
    """Turns running sums (..., L) into decays exp(sum_i - sum_j), j <= i, else 0, (..., L, L)."""
    difference = log_decay[..., :, None] - log_decay[..., None, :]
    past = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).tril()
    return difference.masked_fill(~past, -torch.inf).exp()


def _dual_chunks(length: int) -> tuple[int, int]:
    chunks = math.ceil(length / DUAL_CHUNK)
    return chunks, math.ceil(length / chunks)


def dual_macs(length: int, channels: int, state: int) -> int:
    """Multiply-accumulates of the matrix products of `state_space_dual` on one sequence."""
    chunks, size = _dual_chunks(length)
    macs = chunks * size**2 * (state + channels)
    if chunks > 1:
        macs += (2 * chunks * size + chunks**2) * state * channels
    return macs


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
        batch, length, channels = x.shape
        return batch * dual_macs(length, channels, self.state)
