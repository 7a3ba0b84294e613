"""A forward pass as on a GPU, on the device "meta": its shapes and types without its numbers."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from diffusion_lab.backbone.macs import TRAINING_PASSES
from diffusion_lab.build.model import Model
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.profiling.kept_tensors import KeptTensors

IMAGES = 4, 8  # numbers of images to measure with; some objectives treat a quarter differently
TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by Lightning's precision
# PyTorch's lists of what CUDA's autocast computes in the lower type, and in float32
LOWER = {
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
    *("conv_transpose3d", "matmul", "__matmul__", "mm", "bmm", "mv", "addmm", "addmv", "addr"),
    *("addbmm", "baddbmm", "chain_matmul", "einsum", "prelu", "scaled_dot_product_attention"),
}
FLOAT32 = {
    *("layer_norm", "group_norm", "rms_norm", "norm", "softmax", "log_softmax", "softplus"),
    *("exp", "expm1", "log", "log10", "log1p", "log2", "logsumexp", "pow", "__pow__", "__rpow__"),
    *("reciprocal", "rsqrt", "sum", "prod", "cumsum", "cumprod", "acos", "asin", "tan", "sinh"),
    *("cosh", "erfinv", "dist", "cdist", "renorm", "cosine_similarity", "mse_loss", "l1_loss"),
}


class GPUTypes(TorchFunctionMode):
    """Gives operations on "meta" the types that CUDA's autocast would give, and fused attention.

    Autocast for the CPU switches it on and off, as there is none for "meta".
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}  # parameters and their casts, by id

    def __torch_function__(self, func: Any, types, args=(), kwargs=None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if torch.is_autocast_enabled("cpu") and name in LOWER | FLOAT32:
            lower = torch.get_autocast_dtype("cpu")
            cast = partial(self.cast, lower if name in LOWER else torch.float32)
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            func = fused_attention
        return func(*args, **kwargs)

    def cast(self, dtype: torch.dtype, tensor: Tensor) -> Tensor:
        """The tensor in another type, if it is a float tensor; a parameter's cast is kept."""
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor, tensor.to(dtype)
        return self.casts[id(tensor)][1]

    def bytes(self) -> int:
        """The bytes of the parameters' casts."""
        return sum(cast.nbytes for _, cast in self.casts.values())


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **_
) -> Tensor:
    """Attention that keeps no scores; on "meta", PyTorch would choose the kernel that does."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(q, k, v, dropout_p, is_causal, attn_mask=attn_mask)[0]


class Line(NamedTuple):
    """Bytes of a number of images: `once`, and `per_image` for each."""

    once: int
    per_image: int

    def of(self, images: int) -> int:
        """The bytes of so many images."""
        return self.once + images * self.per_image


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, before compilation.

    With activation checkpointing, the backward pass computes one layer at a time again, and keeps
    `again` for it; autocast keeps the `casts` of all parameters until the forward pass ends.
    `passes` is the number of the network's forward passes that cost as much as both.
    """

    kept: Line
    again: Line
    casts: int
    passes: float

    def of(self, images: int) -> int:
        """The most bytes at once, for so many images."""
        return self.kept.of(images) + max(self.casts, self.again.of(images))


def activations(
    model: Model, plain: Model | None, layers: list[nn.Module], precision: str
) -> Activations:
    """The activations of a model on "meta", in one of Lightning's precisions.

    If the model checkpoints its activations, `plain` is the same model without, and `layers` are
    its layers, which are computed again.
    """
    few, more = (kept_bytes(model, images, precision) for images in IMAGES)
    if plain is None:
        return Activations(line(few.all, more.all), Line(0, 0), 0, few.passes)
    whole, wholes = (kept_bytes(plain, images, precision, layers) for images in IMAGES)
    again = line(max(whole.layers), max(wholes.layers))
    return Activations(line(few.all, more.all), again, whole.casts, few.passes + few.asked)


def line(few: int, more: int) -> Line:
    """The line through the bytes of both numbers of images."""
    slope = (more - few) // (IMAGES[1] - IMAGES[0])
    return Line(few - IMAGES[0] * slope, slope)


@dataclass(frozen=True)
class Kept:
    """The bytes that a forward pass keeps: in all, in each layer, and of parameters' casts.

    For an image, the network was `asked` with gradients and `asked_alone` without.
    """

    all: int
    layers: list[int]
    casts: int
    asked: float
    asked_alone: float

    @property
    def passes(self) -> float:
        """The forward passes that cost as much as these and the backward pass."""
        return TRAINING_PASSES * self.asked + self.asked_alone


def kept_bytes(model: Model, images: int, precision: str, layers: Sequence[nn.Module] = ()) -> Kept:
    """The bytes that a forward pass on "meta" keeps for the backward pass, parameters aside."""
    x0 = torch.zeros(images, *model.denoiser.image_shape, device="meta")
    labels = model.denoiser.conditioning.labels.blank(images, "meta")
    level = model.schedule(torch.full((images,), 0.5)).to("meta")
    parameters, own = list(model.denoiser.parameters()), []
    asked = {True: 0, False: 0}  # images, with gradients and without

    def ask(network: nn.Module, inputs: tuple) -> None:
        asked[torch.is_grad_enabled()] += len(inputs[0])

    with ExitStack() as stack:
        if dtype := TYPES.get(precision):
            stack.enter_context(torch.autocast("cpu", dtype))
        stack.enter_context(types := GPUTypes())
        stack.enter_context(tensors := KeptTensors())
        kept = partial(tensors.bytes, parameters)
        hooks = [model.denoiser.backbone.register_forward_pre_hook(ask)]
        for layer in layers:
            hooks += [
                layer.register_forward_pre_hook(lambda *_: own.append(-kept())),
                layer.register_forward_hook(lambda *_: own.append(own.pop() + kept())),
            ]
        for hook in hooks:
            stack.callback(hook.remove)
        objective = model.objective
        objective.loss(objective.parts(), model.denoiser, x0, x0, level, Given(labels), None)
    with_gradients = asked[True] * (1 + objective.loss.forward_mode / TRAINING_PASSES)
    return Kept(kept(), own, types.bytes(), with_gradients / images, asked[False] / images)
