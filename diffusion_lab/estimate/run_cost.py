"""The memory, the disk and the seconds that a training run takes.

What autograd keeps for a backward pass, and the operations that a GPU is sent, are counted without
one, by both passes on the device "meta", where there are shapes and types without numbers.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from diffusion_lab.assembly.costs import ImageFacts, Memory, RunCost
from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.model import LATER, Model
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone import Energy
from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.messages import UserError
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.families.diffusion.task import DiffusionTask
from diffusion_lab.first_stage.base import Latents
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.training.callbacks import EMA, Checkpoint, PosthocEMA
from diffusion_lab.training.callbacks.periodic import times
from diffusion_lab.training.module import TrainedModule
from diffusion_lab.training.trainer import steps_in_time

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
IN_PLACE = 3  # checkpoints at once: the last, the one before it, and a new one being written
BESIDE_OPTIMIZER = 35  # operations of clipping and of one average, counted in runs
STATISTICS = 8  # bytes of a number of a mean or covariance
META = torch.library.Library("aten", "IMPL")  # kernels that PyTorch's "meta" has not
for name in ("_fused_adamw_", "_fused_sgd_"):
    META.impl(name, lambda *arguments, **named: None, "Meta")


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


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **_
) -> Tensor:
    """Attention that keeps no scores; on "meta", PyTorch would choose the kernel that does."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(q, k, v, dropout_p, is_causal, attn_mask=attn_mask)[0]


class Operations(TorchDispatchMode):
    """Counts the operations that the host sends to a device in this block; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None) -> Any:
        # an optimiser asks for its own count, by an operation that is not sent
        own = func == torch.ops.aten._local_scalar_dense.default
        self.count += func.namespace == "aten" and not func.is_view and not own
        return func(*args, **(kwargs or {}))


def line(few: int, more: int) -> Callable[[int], int]:
    """The bytes of any number of images, from those of both numbers of IMAGES."""
    slope = (more - few) // (IMAGES[1] - IMAGES[0])
    return lambda images: few + (images - IMAGES[0]) * slope


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, before compilation.

    With activation checkpointing, the backward pass computes one layer at a time again, and keeps
    `again` for it; autocast keeps the `casts` of all parameters until the forward pass ends.
    """

    kept: Callable[[int], int]  # by the number of images
    again: Callable[[int], int]
    casts: int
    forward: int  # operations
    both: int  # operations, with the backward pass

    def of(self, images: int) -> int:
        """The most bytes at once, for so many images."""
        return self.kept(images) + max(self.casts, self.again(images))


def activations(cfg: DictConfig, facts: ImageFacts, precision: str) -> Activations:
    """The activations of a model in one of Lightning's precisions."""

    def kept(recomputed: bool) -> list[Kept]:
        changed = cfg.copy()
        changed.activation_checkpointing = recomputed
        try:
            model = build_model(changed, *facts, "meta")
            return [kept_bytes(model, images, precision) for images in IMAGES]
        except RuntimeError:  # a forward pass that needs numbers
            model = build_model(changed, *facts, "cpu")
            return [kept_bytes(model, images, precision) for images in IMAGES]

    with errors_at(cfg, "backbone"):
        few, more = kept(cfg.activation_checkpointing)
    whole = line(few.all, more.all)
    if not cfg.activation_checkpointing:
        return Activations(whole, line(0, 0), 0, few.forward, few.both)
    both, (few, more) = few.both, kept(False)
    again = line(max(few.layers), max(more.layers))
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
        casts = sum(cast.nbytes for _, cast in types.casts.values())
        found = Kept(kept(), own, casts, operations.count, 0)
    try:
        with operations:
            losses.minimised.sum().backward()
    except RuntimeError:
        return found._replace(both=round((1 + BACKWARD) * found.forward))
    return found._replace(both=operations.count)


def memory_of(
    task: DiffusionTask, activations: int, world: int = 1, sharded: bool = False, images: int = 0
) -> Memory:
    """The bytes of a device; raises UserError for an optimiser that cannot be counted."""
    sharded = sharded and world > 1
    module, shared = task.module, world if sharded else 1
    gradients = shares(module.trained_parameters(), shared)
    stage, groups = module.first_stage, module.optimizer().param_groups
    return Memory(
        parameters=shares(module.parameters(), shared) + shares(module.buffers(), 1),
        gradients=gradients,
        optimizer=optimizer_bytes(module, shared),
        # without fusing, a step makes a root of a moment for all parameters at once
        temporary=gradients if any(group.get("fused") is False for group in groups) else 0,
        averages=averages_bytes(task, shared),
        gathered=gathered_bytes(module) if sharded else 0,
        first_stage=shares(stage.network.parameters(), 1) if isinstance(stage, Latents) else 0,
        images=images,
        activations=activations,
    )


def shares(tensors: Iterable[Tensor], world: int) -> int:
    """The bytes of rank 0's shares of tensors, which are divided by rows."""
    return sum(
        -(-len(each) // world) * (each.nbytes // len(each))
        if each.ndim and each.numel()
        else each.nbytes
        for each in tensors
    )


def averages_bytes(task: DiffusionTask, world: int) -> int:
    """The bytes of all averages of the weights."""
    both = task.module, task.module.network
    whole, network = (shares(each.parameters(), world) for each in both)
    ema, posthoc = (each and len(each.lengths) for each in map(task.callback, (EMA, PosthocEMA)))
    return (ema or 0) * whole + (posthoc or 0) * network


def optimizer_bytes(module: TrainedModule, world: int) -> int:
    """The bytes of an optimiser's state."""
    state = stepped(module)[0].state.values()
    return shares((v for own in state for v in own.values() if isinstance(v, Tensor)), world)


def stepped(module: TrainedModule) -> tuple[Optimizer, int]:
    """An optimiser after steps on "meta", and the operations of an update on a GPU."""
    optimizer = module.optimizer()
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = False  # a kernel that "meta" has not
        if "foreach" in group:
            group["foreach"] = True  # a GPU's choice
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()  # makes the state
        with Operations() as operations:
            optimizer.step()
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"the state of {type(optimizer).__name__} cannot be counted without its numbers "
            f"({str(error).splitlines()[0]}); plan with optimizer=adamw, which keeps two numbers "
            "for each parameter"
        ) from error
    finally:
        optimizer.zero_grad()
    return optimizer, operations.count + BESIDE_OPTIMIZER


def gathered_bytes(module: DiffusionModule) -> int:
    """The bytes that FSDP gathers at most: what is outside of layers, and two layers."""
    # the one that is computed and the next are whole at a time, with their gradients
    sizes = [shares(layer.parameters(), 1) for layer in layers_of(module.denoiser.backbone)]
    outside = shares(module.trained_parameters(), 1) - sum(sizes)
    return 2 * (outside + 2 * max(sizes, default=0))


def disk_of(task: DiffusionTask, steps: int) -> dict[str, int]:
    """Bytes of the disk that a run of `steps` steps takes: `checkpoints` at most, and `snapshots`.

    A `checkpoint` has weights, their averages and the optimiser's state. `kept` is the number of
    checkpoints of single steps beside the last. Raises UserError for an optimiser that cannot be
    counted.
    """
    saving, kept = task.callback(Checkpoint), 0
    if saving is not None:
        every = saving.keep_every_n_steps
        kept = ((steps - 1) // every if every else 0) + (saving.top_k if saving.best else 0)
    weights = shares(task.module.state_dict().values(), 1)
    checkpoint = weights + averages_bytes(task, 1) + optimizer_bytes(task.module, 1)
    return {
        "checkpoint": checkpoint,
        "checkpoints": (IN_PLACE + kept) * checkpoint if saving else 0,
        "kept": kept,
        "snapshots": snapshot_bytes(task),
    }


def snapshot_bytes(task: DiffusionTask) -> int:
    """The bytes that the snapshots of averages take."""
    posthoc = task.callback(PosthocEMA)
    parameters = sum(p.numel() for p in task.module.network.parameters())
    return posthoc.bytes_of(parameters) if posthoc else 0


def features_bytes(metrics: GenerativeMetrics | None, images: int | None) -> int | None:
    """The bytes of the reference's features and of their moments; None for unknown `images`."""
    if metrics is None or images is None:
        return 0 if metrics is None else None
    count, dim = min(images, metrics.reference_size or images), metrics.extractor.dim
    mapped = metrics.extractor.spatial_dim
    moments = sum(each * (1 + min(each, count)) for each in (dim, mapped))
    return 4 * count * dim + STATISTICS * moments


@dataclass(frozen=True)
class Duration:
    """The steps of a run that its time limit allows, and the seconds of all it does."""

    steps: int
    training: float
    validation: float
    # of samples for metrics and of grids, without decoding and features; None for unknown calls
    sampling: float | None

    @property
    def seconds(self) -> float:
        """The seconds of what is known."""
        return self.training + self.validation + (self.sampling or 0.0)


def duration_of(cfg: DictConfig, task: DiffusionTask, cost: RunCost, validated: int) -> Duration:
    """The time of a run that validates so many images, or of what its time limit allows."""
    step, call = cost.step, cost.call
    assert step is not None
    assert call is not None

    def lasting(steps: int) -> Duration:
        drawn = task.measured_images(steps) + task.grid_images(steps)
        sampling = None if cost.calls is None else drawn * cost.calls * call
        validations = times(steps, cfg.validate_every_n_steps)
        return Duration(steps, steps * step, validations * validated * call, sampling)

    whole = lasting(cfg.trainer.max_steps)
    during = (whole.sampling or 0.0) - (lasting(1).sampling or 0.0)  # all but the last metrics
    counting = whole.training + whole.validation + during
    return lasting(steps_in_time(cfg.trainer.max_time, whole.steps, counting))
