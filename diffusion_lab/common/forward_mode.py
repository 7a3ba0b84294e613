"""Forward-mode derivatives, for which fused operations without them make way for plain ones."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# the words of PyTorch's errors about such operations
SIGNS = ("forward AD", "forward-mode", "jvp", "functorch")
_taken: ContextVar[bool] = ContextVar("forward_mode", default=False)


def is_taken() -> bool:
    """Whether a forward-mode derivative is being taken, for which only plain operations do."""
    # the compiler cannot trace the variable, and a compiled network has no such derivative
    return not torch.compiler.is_compiling() and _taken.get()


def derivative(
    function: Callable[..., Any], at: Sequence[Tensor], along: Sequence[Tensor]
) -> tuple[Any, Any]:
    """The value of a function of tensors, and its derivative along tangents of their shapes.

    The value is a tensor or a tuple of tensors, and the derivative is like it. Both keep their
    graph for the parameters. Raises ValueError if an operation of the function has no forward-mode
    derivative.
    """
    token = _taken.set(True)
    try:
        value, tangent, *_ = torch.func.jvp(function, tuple(at), tuple(along))
        return value, tangent
    except (NotImplementedError, RuntimeError) as error:
        if not any(sign in str(error) for sign in SIGNS):
            raise
        raise ValueError(
            "the network has an operation without a forward-mode derivative, which this objective "
            f"needs: {str(error).splitlines()[0]}"
        ) from error
    finally:
        _taken.reset(token)
