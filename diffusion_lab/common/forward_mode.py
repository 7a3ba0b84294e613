"""Forward-mode and repeated derivatives, for which fused operations make way for plain ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# the words of PyTorch's errors about such operations
SIGNS = ("forward AD", "forward-mode", "jvp", "functorch")
_taken = False  # a plain value, which torch.compile can read


def is_taken() -> bool:
    """Whether a derivative is being taken for which only plain operations do."""
    return _taken


def plain_layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm by sums and products, float32 at least."""
    dims = tuple(range(-len(shape), 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


class PlainLayerNorms(TorchFunctionMode):
    """A context in which layer norms are plain, whoever calls them.

    In PyTorch 2.13 the gradient of the fused one's forward-mode derivative is wrong.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        if func in (F.layer_norm, torch.layer_norm):
            func = plain_layer_norm
        return func(*args, **(kwargs or {}))


@contextmanager
def plain_operations() -> Iterator[None]:
    """A context in which `is_taken`."""
    global _taken
    before, _taken = _taken, True
    try:
        with PlainLayerNorms():
            yield
    finally:
        _taken = before


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient, of `at`'s shape, of a scalar function; it can be differentiated again.

    Unlike autograd's it can be taken without gradients for anything else, and within `derivative`.
    """
    kept = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(kept), plain_operations():
        return torch.func.grad(function)(at.clone() if at.is_inference() else at)


def derivative(
    function: Callable[..., Any], at: Sequence[Tensor], along: Sequence[Tensor]
) -> tuple[Any, Any]:
    """The value of a function of tensors, and its derivative along tangents of their shapes.

    The value is a tensor or a tuple of tensors, and the derivative is like it. Both keep their
    graph for the parameters. Raises ValueError if an operation of the function has no forward-mode
    derivative.
    """
    try:
        with plain_operations():
            value, tangent, *_ = torch.func.jvp(function, tuple(at), tuple(along))
        return value, tangent
    except (NotImplementedError, RuntimeError) as error:
        if not any(sign in str(error) for sign in SIGNS):
            raise
        raise ValueError(
            "the network has an operation without a forward-mode derivative, which this objective "
            f"needs: {str(error).splitlines()[0]}"
        ) from error
