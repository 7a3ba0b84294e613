"""Counts the bytes that autograd keeps for a backward pass."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks


class KeptTensors(saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass of the block, on any device."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a tensor, which it returns."""
        storage = tensor.untyped_storage()
        # by the storage's own address: on "meta" its data have none; kept alive, or it might recur
        self.storages[storage._cdata] = storage
        return tensor

    def bytes(self, apart_from: Iterable[Tensor] = ()) -> int:
        """Bytes kept so far, some tensors aside."""
        aside = {tensor.untyped_storage()._cdata for tensor in apart_from}
        return sum(each.nbytes() for key, each in self.storages.items() if key not in aside)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, parameters aside."""
    with (kept := KeptTensors()):
        forward()
    return kept.bytes(parameters)


def bytes_in_graph(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that the graph of `forward`'s result keeps, parameters aside; takes no hooks.

    Asked in this way, checkpointed layers would be computed again.
    """
    kept = KeptTensors()
    for tensor in _saved_in_graph(forward()):
        kept.keep(tensor)
    return kept.bytes(parameters)


def _saved_in_graph(output: Tensor) -> Iterator[Tensor]:
    nodes: list[Node | None] = [output.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in (*saved, getattr(node, "saved_tensors", ())):  # of an operation of ours
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if isinstance(each, Tensor))
