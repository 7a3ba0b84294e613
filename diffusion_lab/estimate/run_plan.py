"""A plan: a run on GPUs that are not here, and what it takes of them.

The time of a step is that of a roofline: FLOPs over peak, bytes over bandwidth, whichever takes
longer, and at least the time in which the host sends its operations. `mfu`, the share of the peak
that products reach, `link_share`, that of the links, and `launch` are guesses. DDP sends gradients
during the backward pass, two thirds of a step's compute, and FSDP gathers and sends during both
passes: only what takes longer than that is waited for.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from diffusion_lab.assembly import costs
from diffusion_lab.assembly.instantiate import check_keys, instantiate
from diffusion_lab.backbone.macs import PER_INPUT, TRAINING_PASSES, Cost, seen_flops
from diffusion_lab.backbone.state_space import S6, SSD
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import above, flag, inside, optional, share, whole
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data.loader import FREE_MEMORY_SHARE
from diffusion_lab.data.source import Absent
from diffusion_lab.estimate import run_cost
from diffusion_lab.estimate.gpu import CONTEXT, GPU, PLAIN, UTILISATION
from diffusion_lab.families.diffusion.task import build_task
from diffusion_lab.first_stage.base import FirstStage, Shape
from diffusion_lab.training.callbacks import Evaluation
from diffusion_lab.training.train import ALLOWED

PLANNED = ALLOWED | {
    "nodes": optional(whole(1)),
    "devices": optional(whole(1)),
    "num_images": optional(whole(1)),
    "latents": flag(),
    "mfu": optional(share()),
    "launch": above(0),
    "link_share": share(),
    "reserve": inside(0, 1),
}
A_NODE = 8  # devices of a node, where nothing else is said
BACKWARD = 2 / 3  # of the time of both passes
GUESSES = ("mfu", "launch", "link_share", "reserve")
LOOP = 1.5e-3  # seconds of a step in Lightning's loop and ours, on one core of a server
STATE_SPACES = (S6, SSD)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *PER_INPUT)
MOST_IMAGES = 2**20  # in a micro-batch


class LatentsElsewhere(FirstStage):
    """Latents of which only the shape is known; their cached moments have twice the channels."""

    cache = True

    def __init__(self, image_shape: Shape):
        super().__init__(image_shape, image_shape)

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError("a plan encodes no images")

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError("a plan decodes no latents")

    def moments(self, images: Tensor) -> Tensor:
        return torch.cat([images, images], 1)


@dataclass(frozen=True)
class Step:
    """The seconds of a training step: of products, of memory, of the update, and of sending."""

    compute: float  # FLOPs of all passes
    encoding: float  # FLOPs of a first stage whose latents are not cached
    activations: float  # activations, written once and read once
    update: float  # weights, gradients, optimiser state and averages, read and written
    communication: float  # a ring over all GPUs
    waiting: float  # the part of communication that nothing hides
    host: float  # operations sent one by one, and the loop around them, at the same time

    @property
    def device(self) -> float:
        """The seconds in which the GPU is busy or waits for others."""
        longer = max(self.compute, self.activations)
        return longer + self.encoding + self.update + self.waiting

    @property
    def seconds(self) -> float:
        """The seconds of the step."""
        return max(self.device, self.host)


class RunPlan:
    """The run of a configuration of `plan`, and what it takes; refuses what training would."""

    def __init__(self, cfg: DictConfig, name: str):
        check_keys(cfg, PLANNED)
        if cfg.latents and cfg.image_shape is None:
            raise UserError(
                "latents=true needs their shape; write image_shape=[channels,height,width]"
            )
        self.name, facts = name, costs.image_facts(cfg)
        self.cfg = cfg = with_facts(cfg, facts)
        self.gpu: GPU = instantiate(cfg, "gpu")
        self.nodes = cfg.nodes or number(cfg.trainer.num_nodes, 1)
        self.devices = cfg.devices or number(cfg.trainer.devices, A_NODE)
        self.batch = solve_batch(cfg.batch_size, self.nodes * self.devices, cfg.micro_batch_size)
        given = cfg.trainer.precision
        self.precision = "bf16-mixed" if given == "auto" else given
        self.sharded = self.batch.world > 1 and sharded(cfg.trainer)
        one = "ddp" if self.batch.world > 1 else "one process"
        self.strategy = "fsdp" if self.sharded else one
        self.task = build_task(cfg, device="meta")
        self.refuse_second_networks()
        self.black = torch.zeros(1, *facts.shape, dtype=torch.uint8)  # an image
        counts = costs.counted(cfg, facts, costs.calls_of_one_network(cfg, facts))
        self.activations = run_cost.activations(cfg, facts, self.precision)
        held, images = self.activations.of(self.batch.micro_batch), self.stored_bytes() or 0
        choice, most = cfg.data.on_device, FREE_MEMORY_SHARE * self.gpu.memory
        if choice is False or (choice is not True and images >= most):
            images = 0  # they are kept elsewhere
        self.memory = run_cost.memory_of(self.task, held, self.batch.world, self.sharded, images)
        self.kind = kind_of(self.task.module.denoiser, counts.modules)
        self.mfu = cfg.mfu or UTILISATION[self.kind]
        self.step = self.step_of(counts, self.memory)
        drawn = self.task.callback(Evaluation)
        launching = cfg.launch * self.activations.forward / (drawn.batch_size if drawn else 1)
        call = max(self.seconds_of(counts), launching) / self.batch.world
        self.cost = replace(counts, memory=self.memory, step=self.step.seconds, call=call)
        self.duration = run_cost.duration_of(cfg, self.task, self.cost, cfg.data.validate_on)
        self.usable = (1 - cfg.reserve) * (self.gpu.memory - CONTEXT)  # bytes of a GPU
        self.fits = self.memory.total <= self.usable  # a micro-batch into a GPU
        self.images_per_second = self.batch.batch_size / self.step.seconds  # of all GPUs

    def refuse_second_networks(self) -> None:
        """Raises UserError for a network that steps ask beside the one that is trained."""
        module = self.task.module
        if module.objective.teacher is not None and module.objective.teacher.asked:
            second = "objective/teacher=model", "objective=ect"
        elif module.alignment is not None and module.alignment.extractor is not None:
            second = "alignment", "alignment=none"
        else:
            return
        raise UserError(
            f"{second[0]} is a second network that every step asks, which plan does not count; "
            f"plan the run with {second[1]}"
        )

    def stored_bytes(self) -> int | None:
        """The bytes of all training images as they are kept; None if their number is not known."""
        stage, count = self.task.module.first_stage, self.cfg.num_images
        if count is None:
            return None
        if not stage.cache:
            return count * self.black.numel()
        # moments are float32, and those of mirrored images are kept beside them
        return count * 4 * (1 + self.cfg.data.flip) * stage.moments(self.black).numel()

    def seconds_of(self, cost: costs.RunCost, reached: float | None = None) -> float:
        """The seconds of a network call on an image by its FLOPs, at a share of the peaks."""
        mfu = reached or self.mfu
        plain = reached or self.cfg.mfu or PLAIN
        products = self.cfg.matmul_precision
        macs = convolved(self.task.module.denoiser, cost.modules)
        return sum(
            2 * each / self.gpu.speed(self.precision, tf32, mfu, plain)
            for each, tf32 in (
                (macs, products != "highest"),  # PyTorch's own default allows it for these
                (cost.macs - macs, products in ("high", "medium")),
            )
        )

    def step_of(self, cost: costs.RunCost, memory: costs.Memory) -> Step:
        """The time of a training step."""
        module, gpu, batch = self.task.module, self.gpu, self.batch
        images, stage = batch.accumulate * batch.micro_batch, module.first_stage
        # derivatives of score matching are not counted, and take a pass at least
        derived = TRAINING_PASSES + module.objective.loss.forward_mode
        passes = (cost.passes or derived) + self.cfg.activation_checkpointing
        compute = images * passes * self.seconds_of(cost)
        encoding = 0.0  # of images that are not encoded before training
        if not (stage.cache or stage.of_pixels):
            encoding = images * seen_flops(lambda: stage.moments(self.black))
        encoder = gpu.speed("32-true", True, self.cfg.mfu or UTILISATION["convolutions"], PLAIN)
        kept = 2 * batch.accumulate * memory.activations / gpu.bandwidth
        state = 2 * (memory.parameters + memory.optimizer + memory.averages)
        # gradients are clipped before they are used, and each average reads the weights
        moved = state + 3 * memory.gradients + memory.averages
        # a ring of an all-reduce sends every number twice; FSDP gathers parameters for both passes
        # and scatters gradients, for each micro-batch
        rounds = 3 * batch.accumulate if self.sharded else 2
        weights = sum(each.nbytes for each in module.trained_parameters())
        sent = rounds * weights * (batch.world - 1) / batch.world
        communication = sent / (self.cfg.link_share * gpu.bus(self.devices, self.nodes))
        hides = max(compute, kept) * (1 if self.sharded else BACKWARD / batch.accumulate)
        return Step(
            compute,
            encoding / encoder,
            kept,
            moved / gpu.bandwidth,
            communication,
            max(0.0, communication - hides),
            LOOP + self.cfg.launch * self.operations,
        )

    @property
    def operations(self) -> int:
        """The operations of a step, without compilation, which makes one of many."""
        return self.batch.accumulate * self.activations.both + run_cost.stepped(self.task.module)[1]

    @property
    def largest_micro_batch(self) -> int:
        """The most images that fit into a GPU at once."""
        rest = self.usable - (self.memory.total - self.memory.activations)
        return max(0, bisect_right(range(MOST_IMAGES), rest, key=self.activations.of) - 1)

    @property
    def fitting(self) -> int:
        """The largest micro-batch that fits and divides a GPU's share of the batch; 0 if none."""
        share = self.batch.micro_batch * self.batch.accumulate
        most = min(share, self.largest_micro_batch)
        return next((n for n in range(most, 0, -1) if share % n == 0), 0)

    def as_dict(self) -> dict[str, Any]:
        """All numbers as plain values."""
        memory, batch, images_per_second = self.memory, self.batch, self.images_per_second
        # as nvidia-smi shows it, with CUDA's own and the reserve
        shown = memory.total / (1 - self.cfg.reserve) + CONTEXT
        caches = {  # None if they depend on an unknown number of images
            "latents": self.stored_bytes() if self.task.module.first_stage.cache else 0,
            "features": run_cost.features_bytes(self.task.metrics, self.cfg.num_images),
        }
        # without recomputed FLOPs
        at_peak = TRAINING_PASSES * self.seconds_of(self.cost, 1) / batch.world
        at_peak *= self.cost.training_share
        return {
            "name": self.name,
            "gpu": vars(self.gpu),
            "nodes": self.nodes,
            "devices": self.devices,
            "strategy": self.strategy,
            "precision": self.precision,
            "parameters": self.cost.parameters,
            "macs": self.cost.macs,
            **asdict(batch),
            "memory": asdict(memory)
            | {"total": memory.total, "usable": self.usable, "shown": shown},
            "activation_bytes": self.activations.of(2) - self.activations.of(1),
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "step": asdict(self.step) | {"seconds": self.step.seconds},
            "images_per_second": images_per_second,
            "share_of_peak": at_peak * images_per_second,
            "images_seen": self.duration.steps * batch.batch_size,
            "duration": asdict(self.duration) | {"seconds": self.duration.seconds},
            "disk": run_cost.disk_of(self.task, self.duration.steps) | caches,
            "kind": self.kind,
            "operations": self.operations,
            "guesses": {key: self.cfg[key] for key in GUESSES} | {"mfu": self.mfu},
        }


def convolved(network: nn.Module, modules: list[Cost]) -> int:
    """The MACs of a network's convolutions; `modules` are its costs by their names."""
    layers = dict(network.named_modules())
    return sum(each.macs for each in modules if isinstance(layers.get(each.name), CONVOLUTIONS))


def kind_of(network: nn.Module, modules: list[Cost]) -> str:
    """The kind of a network in UTILISATION."""
    if any(isinstance(module, STATE_SPACES) for module in network.modules()):
        return "state spaces"
    whole = sum(each.macs for each in modules)
    return "convolutions" if convolved(network, modules) > whole / 2 else "matrix products"


def with_facts(cfg: DictConfig, facts: costs.ImageFacts) -> DictConfig:
    """A copy of a configuration, for images or latents of these facts where they are given."""
    cfg = cfg.copy()
    if cfg.image_shape is not None or cfg.num_classes is not None:
        source = {
            "_target_": f"{Absent.__module__}.{Absent.__name__}",
            "image_shape": list(facts.shape),
            "num_classes": facts.labels.classes,
            "label_size": facts.labels.size,
        }
        OmegaConf.update(cfg, "data.source", source, merge=False)
        cfg.data.pad = None
    if cfg.latents:
        stage = {"_target_": f"{__name__}.{LatentsElsewhere.__name__}", "_partial_": True}
        OmegaConf.update(cfg, "first_stage", stage, merge=False)
    return cfg


def number(given: object, otherwise: int) -> int:
    """A number of devices or nodes as a trainer takes it; `otherwise` where it is automatic."""
    if isinstance(given, ListConfig):
        return len(given)
    return given if type(given) is int and given > 0 else otherwise
