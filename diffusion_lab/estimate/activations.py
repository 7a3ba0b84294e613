"""The bytes that autograd keeps for a backward pass on a GPU, and its operations, without one.

Both passes are made on the device "meta", where there are shapes and types without numbers.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from diffusion_lab.assembly.costs import ImageFacts
from diffusion_lab.assembly.model import LATER, Model
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone import Energy
from diffusion_lab.backbone.base import layers_of
from diffusion_lab.diffusion.estimate import Given

IMAGES = 4, 8  # numbers of images to measure with; some objectives treat a quarter differently
BACKWARD = 4 / 3  # operations of a backward pass for one of a forward pass, where it cannot be made
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

    def keep_graph_of(self, output: Tensor) -> None:
        """Counts what the graph of a tensor keeps, where hooks are refused."""
        nodes, seen = [output.grad_fn], set[Node]()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
            saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            saved += getattr(node, "saved_tensors", ())  # of an operation of ours
            tree_map_only(Tensor, self.keep, saved)

    def bytes(self, apart_from: Iterable[Tensor] = ()) -> int:
        """Bytes kept so far, some tensors aside."""
        aside = {tensor.untyped_storage()._cdata for tensor in apart_from}
        return sum(each.nbytes() for key, each in self.storages.items() if key not in aside)


class GPUTypes(TorchFunctionMode):
    """Gives operations on "meta" the types that CUDA's autocast would give, and fused attention.

    Autocast for the CPU switches it on and off, as there is none for "meta". PyTorch's own fake
    tensors on a GPU would have these types, but no gradients where PyTorch was built without CUDA.
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


NOT_SENT = {torch.ops.aten._local_scalar_dense.default}  # an optimiser asks for its own count


class Operations(TorchDispatchMode):
    """Counts the operations that the host sends to a device in this block; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view and func not in NOT_SENT
        return func(*args, **(kwargs or {}))


class Line(NamedTuple):
    """Bytes of a number of images: `once`, and `per_image` for each."""

    once: int
    per_image: int

    @classmethod
    def through(cls, few: int, more: int) -> "Line":
        """The line through the bytes of both numbers of IMAGES."""
        slope = (more - few) // (IMAGES[1] - IMAGES[0])
        return cls(few - IMAGES[0] * slope, slope)

    def of(self, images: int) -> int:
        """The bytes of so many images."""
        return self.once + images * self.per_image


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, before compilation.

    With activation checkpointing, the backward pass computes one layer at a time again, and keeps
    `again` for it; autocast keeps the `casts` of all parameters until the forward pass ends.
    """

    kept: Line
    again: Line
    casts: int
    forward: int  # operations
    both: int  # operations, with the backward pass

    def of(self, images: int) -> int:
        """The most bytes at once, for so many images."""
        return self.kept.of(images) + max(self.casts, self.again.of(images))


def activations(cfg: DictConfig, facts: ImageFacts, precision: str) -> Activations:
    """The activations of a model in one of Lightning's precisions."""

    def kept(recomputed: bool) -> list[Kept]:
        changed = cfg.copy()
        changed.activation_checkpointing = recomputed
        try:
            model = build_model(changed, *facts, "meta")
            return [kept_bytes(model, images, precision) for images in IMAGES]
        except (RuntimeError, NotImplementedError):  # a forward pass that needs numbers
            model = build_model(changed, *facts, "cpu")
            return [kept_bytes(model, images, precision) for images in IMAGES]

    few, more = kept(cfg.activation_checkpointing)
    whole = Line.through(few.all, more.all)
    if not cfg.activation_checkpointing:
        return Activations(whole, Line(0, 0), 0, few.forward, few.both)
    both, (few, more) = few.both, kept(False)
    again = Line.through(max(few.layers), max(more.layers))
    return Activations(whole, again, few.casts, few.forward, both)


class Kept(NamedTuple):
    """The bytes that a forward pass keeps: in all, in each layer, and of parameters' casts."""

    all: int
    layers: list[int]
    casts: int
    forward: int  # operations
    both: int  # operations, with the backward pass


def kept_bytes(model: Model, images: int, precision: str) -> Kept:
    """The bytes that a forward pass keeps for the backward pass, parameters aside."""
    denoiser = model.denoiser
    parameters, own = list(denoiser.parameters()), []
    device = parameters[0].device
    x0 = torch.zeros(images, *denoiser.image_shape, device=device)
    labels = denoiser.conditioning.labels.blank(images, device)
    level = model.schedule(torch.full((images,), 0.5)).to(device)
    objective, tensors = model.objective.to(device), KeptTensors()
    if objective.teacher and objective.teacher.asked:  # the network in its place: it keeps nothing
        objective.teacher.open(lambda labels: lambda x, level: denoiser(x, level, Given(labels)))
    kept = partial(tensors.bytes, parameters)
    # torch.func, which takes an energy's gradient, refuses hooks; and a walk through the graph
    # would compute checkpointed layers again
    energy = isinstance(denoiser.backbone, Energy)
    with ExitStack() as stack:
        if dtype := TYPES.get(precision):
            stack.enter_context(torch.autocast("cpu", dtype))
        stack.enter_context(types := GPUTypes())
        if not energy:
            stack.enter_context(tensors)
        for layer in layers_of(denoiser.backbone):
            before = layer.register_forward_pre_hook(lambda *_: own.append(-kept()))
            after = layer.register_forward_hook(lambda *_: own.append(own.pop() + kept()))
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(operations := Operations())
        losses = objective.loss(
            objective.parts(LATER), denoiser, x0, x0, level, Given(labels), None
        )
        if energy:
            tensors.keep_graph_of(losses.minimised.sum())
        found = Kept(kept(), own, types.bytes(), operations.count, 0)
    try:
        with operations:
            losses.minimised.sum().backward()
    except (RuntimeError, NotImplementedError):
        return found._replace(both=round((1 + BACKWARD) * found.forward))
    return found._replace(both=operations.count)
