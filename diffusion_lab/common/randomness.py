"""Randomness: one seed per sample, so that a sample does not depend on batch size or rank."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

SAMPLE = 0x73616D706C65  # separates these draws from others with the same seed


def mix_seed(*parts: int) -> int:
    """Mixes several integers into one 63-bit seed; different tuples give unrelated seeds."""
    state = 0x9E3779B97F4A7C15
    for part in parts:  # splitmix64's finaliser over each part
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def seed_device(seed: int, device: torch.device) -> None:
    """Seeds the generators of the CPU and of a device, as torch.manual_seed does for all devices.

    That one formats a stack trace for each kind of device, which takes longer than a small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        own = torch.cuda.current_device() if device.index is None else device.index
        if own < len(torch.cuda.default_generators):  # none before CUDA is used
            torch.cuda.default_generators[own].manual_seed(seed)
        else:
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class SampleNoise:
    """Unit Gaussian noise for a batch of samples, each from its own generator.

    Calling it draws the next (B, *shape) float32 noise; `randn_like` serves stochastic samplers.
    The generators live on the CPU, so a sample is the same on every device.
    """

    def __init__(self, seed: int, ids: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        seeds = (mix_seed(seed, SAMPLE, i) for i in ids)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return self._drawn(shape).to(self.device)  # (B, *shape)

    def _drawn(self, shape: tuple[int, ...]) -> Tensor:
        drawn = (torch.randn(shape, generator=g, dtype=torch.float32) for g in self.generators)
        return torch.stack([*drawn])

    @property
    def randn_like(self) -> Callable[[Tensor], Tensor]:
        """The function that gives a sampler noise of the same shape (B, ...) as its argument.

        The next noise for a GPU, of that shape, is drawn by a thread while the GPU computes.
        """
        if self.device.type != "cuda":
            return lambda x: self(x.shape[1:]).to(x.dtype)
        thread, ahead = ThreadPoolExecutor(1), deque[Future[Tensor]]()

        def draw(x: Tensor) -> Tensor:
            while len(ahead) < 2:
                ahead.append(thread.submit(lambda: self._drawn(x.shape[1:]).pin_memory()))
            return ahead.popleft().result().to(self.device, non_blocking=True).to(x.dtype)

        return draw


def random_places(count: int, size: int | None) -> Tensor:
    """The first `size`, or all, of the places 0, ..., count - 1 in one fixed random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size]
