"""A plan: a run on GPUs that are not here, and what it takes of them.

The time of a step is that of a roofline: FLOPs over peak, bytes over bandwidth, whichever takes
longer. `mfu`, the share of the peak that matrix products reach, and `link_share`, that of the
links, are guesses. DDP sends gradients during the backward pass, two thirds of a step's compute,
and FSDP gathers and sends during both passes: only what takes longer than that is waited for.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from diffusion_lab.assembly.costs import ImageFacts, calls_of_one_network, image_facts
from diffusion_lab.assembly.instantiate import check_keys, instantiate
from diffusion_lab.backbone.macs import TRAINING_PASSES, seen_flops
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import flag, inside, optional, share, whole
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data.loader import FREE_MEMORY_SHARE
from diffusion_lab.data.source import Absent
from diffusion_lab.estimate.activations import Activations, activations
from diffusion_lab.estimate.gpu import GPU
from diffusion_lab.estimate.run_cost import (
    Duration,
    Memory,
    RunCost,
    checkpoint_bytes,
    checkpoints_at_once,
    counted,
    duration_of,
    features_bytes,
    kept_steps,
    memory_of,
    snapshot_bytes,
)
from diffusion_lab.families.diffusion.task import build_task
from diffusion_lab.first_stage.base import FirstStage, Shape
from diffusion_lab.training.train import ALLOWED

PLANNED = ALLOWED | {
    "nodes": optional(whole(1)),
    "devices": optional(whole(1)),
    "num_images": optional(whole(1)),
    "latents": flag(),
    "mfu": share(),
    "link_share": share(),
    "reserve": inside(0, 1),
}
A_NODE = 8  # devices of a node, where nothing else is said
UNCOUNTED = {  # second networks that every step asks, and what to plan with instead
    "objective/teacher=model": "objective=ect",
    "alignment": "alignment=none",
}
BACKWARD = 2 / 3  # of the time of both passes
GUESSES = ("mfu", "link_share", "reserve")
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


class RunElsewhere:
    """The parts of the run that `cfg`, a configuration of the command plan, describes.

    The network is on "meta". Raises UserError for what training would refuse, too.
    """

    def __init__(self, cfg: DictConfig):
        check_keys(cfg, PLANNED)
        if cfg.latents and cfg.image_shape is None:
            raise UserError(
                "latents=true needs their shape; write image_shape=[channels,height,width]"
            )
        self.facts = image_facts(cfg)
        self.cfg = with_facts(cfg, self.facts)
        self.gpu: GPU = instantiate(cfg, "gpu")
        self.nodes = cfg.nodes or number(cfg.trainer.num_nodes, 1)
        self.devices = cfg.devices or number(cfg.trainer.devices, A_NODE)
        self.batch = solve_batch(cfg.batch_size, self.nodes * self.devices, cfg.micro_batch_size)
        given = cfg.trainer.precision
        self.precision = "bf16-mixed" if given == "auto" else given
        self.sharded = self.batch.world > 1 and sharded(cfg.trainer)
        self.task = build_task(self.cfg, device="meta")
        module = self.task.module
        teacher = module.objective.teacher
        asked = teacher is not None and teacher.asked, module.alignment is not None
        for second, (key, instead) in zip(asked, UNCOUNTED.items(), strict=True):
            if second:
                raise UserError(
                    f"{key} is a second network that every step asks, which plan does not count; "
                    f"plan the run with {instead}"
                )

    @property
    def strategy(self) -> str:
        """The word for how the model is spread over the GPUs."""
        return "fsdp" if self.sharded else "ddp" if self.batch.world > 1 else "one process"

    @property
    def flops_per_second(self) -> float:
        """The FLOP/s that a GPU is guessed to reach."""
        return self.cfg.mfu * self.gpu.peak(self.precision)

    def encoding_flops(self) -> int:
        """The FLOPs of encoding an image for a training step; 0 if that is done before training."""
        stage = self.task.module.first_stage
        return (
            0 if stage.cache or stage.of_pixels else seen_flops(lambda: stage.moments(self.black))
        )

    @property
    def black(self) -> Tensor:
        """A black image, uint8 (1, C, H, W)."""
        return torch.zeros(1, *self.facts.shape, dtype=torch.uint8)

    def stored_bytes(self) -> int | None:
        """The bytes of all training images as they are kept; None if their number is not known.

        Encoded images are float32 moments, and mirrored ones are kept beside them.
        """
        stage, count = self.task.module.first_stage, self.cfg.num_images
        if count is None:
            return None
        if not stage.cache:
            return count * math.prod(self.facts.shape)
        return count * 4 * (1 + self.cfg.data.flip) * stage.moments(self.black).numel()

    def images_bytes(self) -> int:
        """The bytes of the training images, where they are kept on the GPU."""
        size, choice = self.stored_bytes(), self.cfg.data.on_device
        if size is None or choice is False:
            return 0
        return size if choice is True or size < FREE_MEMORY_SHARE * self.gpu.memory else 0


def with_facts(cfg: DictConfig, facts: ImageFacts) -> DictConfig:
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


@dataclass(frozen=True)
class Step:
    """The seconds of a training step: of products, of memory, of the update, and of sending."""

    compute: float  # FLOPs of all passes
    encoding: float  # FLOPs of a first stage whose latents are not cached
    activations: float  # activations, written once and read once
    update: float  # weights, gradients, optimiser state and averages, read and written
    communication: float  # a ring over all GPUs
    waiting: float  # the part of communication that nothing hides

    @property
    def seconds(self) -> float:
        """The seconds of the step."""
        longer = max(self.compute, self.activations)
        return longer + self.encoding + self.update + self.waiting


def step_of(run: RunElsewhere, cost: RunCost, memory: Memory) -> Step:
    """The time of a training step."""
    accumulate, images = run.batch.accumulate, run.batch.accumulate * run.batch.micro_batch
    # derivatives of score matching are not counted, and take a pass at least
    derived = TRAINING_PASSES + run.task.module.objective.loss.forward_mode
    passes = (cost.passes or derived) + run.cfg.activation_checkpointing
    compute = images * cost.flops(passes) / run.flops_per_second
    encoding = images * run.encoding_flops() / (run.cfg.mfu * run.gpu.float32_flops)
    kept = 2 * accumulate * memory.activations / run.gpu.bandwidth
    state = 2 * (memory.parameters + memory.optimizer + memory.averages)
    # gradients are clipped before they are used, and each average reads the weights
    moved = state + 3 * memory.gradients + memory.averages
    communication = sent_bytes(run) / (run.cfg.link_share * run.gpu.bus(run.devices, run.nodes))
    hides = max(compute, kept) * (1 if run.sharded else BACKWARD / accumulate)
    return Step(
        compute,
        encoding,
        kept,
        moved / run.gpu.bandwidth,
        communication,
        max(0.0, communication - hides),
    )


def sent_bytes(run: RunElsewhere) -> float:
    """The bytes that each GPU of a ring sends in a step.

    An all-reduce sends every number twice; FSDP gathers parameters for both passes and scatters
    gradients, for each micro-batch.
    """
    size = sum(each.nbytes for each in run.task.module.trained_parameters())
    rounds = 3 * run.batch.accumulate if run.sharded else 2
    return rounds * size * (run.batch.world - 1) / run.batch.world


@dataclass(frozen=True)
class RunPlan:
    """A run on GPUs that are not here, and what it takes of them."""

    name: str
    run: RunElsewhere
    cost: RunCost
    memory: Memory
    activations: Activations
    step: Step
    duration: Duration
    disk: dict[str, int | None]  # bytes; None if they depend on an unknown number of images

    @property
    def usable(self) -> float:
        """The bytes of a GPU without the reserve."""
        return (1 - self.run.cfg.reserve) * self.run.gpu.memory

    @property
    def fits(self) -> bool:
        """Whether a micro-batch fits into a GPU."""
        return self.memory.total <= self.usable

    @property
    def largest_micro_batch(self) -> int:
        """The most images that fit into a GPU at once."""
        rest = self.usable - (self.memory.total - self.memory.activations)
        low, high = 0, MOST_IMAGES
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.activations.of(middle) <= rest else (low, middle)
        return low

    @property
    def fitting(self) -> int:
        """The largest micro-batch that fits and divides a GPU's share of the batch; 0 if none."""
        share = self.run.batch.micro_batch * self.run.batch.accumulate
        most = min(share, self.largest_micro_batch)
        return next((n for n in range(most, 0, -1) if share % n == 0), 0)

    def as_dict(self) -> dict[str, Any]:
        """All numbers as plain values."""
        run, memory, batch = self.run, self.memory, self.run.batch
        images_per_second = batch.batch_size / self.step.seconds
        # the model's FLOPs, without recomputed ones
        flops = self.cost.flops(TRAINING_PASSES) * images_per_second
        return {
            "name": self.name,
            "gpu": vars(run.gpu),
            "nodes": run.nodes,
            "devices": run.devices,
            "strategy": run.strategy,
            "precision": run.precision,
            "parameters": self.cost.parameters,
            "macs": self.cost.macs,
            **asdict(batch),
            "memory": asdict(memory) | {"total": memory.total, "usable": self.usable},
            "activation_bytes": self.activations.of(2) - self.activations.of(1),
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "step": asdict(self.step) | {"seconds": self.step.seconds},
            "images_per_second": images_per_second,
            "share_of_peak": flops / (batch.world * run.gpu.peak(run.precision)),
            "images_seen": self.duration.steps * batch.batch_size,
            "duration": asdict(self.duration) | {"seconds": self.duration.seconds},
            "disk": self.disk,
            "guesses": {key: run.cfg[key] for key in GUESSES},
        }


def plan_of(cfg: DictConfig, name: str) -> RunPlan:
    """The plan of the run that a configuration describes; raises UserError for a wrong one."""
    run = RunElsewhere(cfg)
    cfg, task, batch = run.cfg, run.task, run.batch
    counts = counted(cfg, run.facts, calls_of_one_network(cfg, run.facts))
    kept = activations(cfg, run.facts, run.precision)
    held = kept.of(batch.micro_batch)
    memory = memory_of(task, held, batch.world, run.sharded, run.images_bytes())
    step = step_of(run, counts, memory)
    call = counts.flops() / run.flops_per_second / batch.world
    cost = replace(counts, memory=memory, step=step.seconds, call=call)
    duration = duration_of(cfg, task, cost, cfg.data.validate_on)
    checkpoint = checkpoint_bytes(task)
    disk = {
        "checkpoint": checkpoint,
        "checkpoints": checkpoints_at_once(task, duration.steps) * checkpoint,
        "kept": kept_steps(task, duration.steps),  # of these, checkpoints of single steps
        "snapshots": snapshot_bytes(task),
        "latents": run.stored_bytes() if task.module.first_stage.cache else 0,
        "features": features_bytes(task.metrics, cfg.num_images),
    }
    return RunPlan(name, run, cost, memory, kept, step, duration, disk)
