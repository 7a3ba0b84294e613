"""An average of trained parameters, kept next to them and sharded in the same way."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffusion_lab.compute.sharding import local, shared_as, whole


class WeightAverage:
    """An average of the parameters of a module; each rank holds its share of it.

    It begins as `state`, unsharded tensors by name, or else as the current parameters.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, Tensor] | None = None):
        self._parameters = dict(module.named_parameters())
        begin = self._parameters if state is None else state
        self._shares = [
            local(shared_as(begin[name], parameter)).to(parameter.device, copy=True)
            for name, parameter in self._parameters.items()
        ]

    def follow(self) -> None:
        """Moves the average to the device of the parameters, once they have been moved."""
        places = (parameter.device for parameter in self._parameters.values())
        self._shares = [share.to(place) for share, place in zip(self._shares, places, strict=True)]

    def update(self, weight: float) -> None:
        """Moves the average towards the parameters: by `weight`, in [0, 1], of the way."""
        torch._foreach_lerp_(self._shares, self._own(), weight)

    def copy_into_parameters(self) -> None:
        """Replaces the parameters by the average."""
        torch._foreach_copy_(self._own(), self._shares)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchanges the parameters and the average for this block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchanges the parameters and the average."""
        kept = [parameter.clone() for parameter in self._own()]
        self.copy_into_parameters()
        torch._foreach_copy_(self._shares, kept)

    def whole(self) -> dict[str, Tensor]:
        """An unsharded copy of the average on the CPU, by names of parameters, on every rank."""
        with self.swapped():
            # copied: the parameters themselves are about to change again
            return {
                name: whole(parameter.detach()).to("cpu", copy=True)
                for name, parameter in self._parameters.items()
            }

    def _own(self) -> list[Tensor]:
        """This rank's share of each parameter, as a view."""
        return [local(parameter) for parameter in self._parameters.values()]
