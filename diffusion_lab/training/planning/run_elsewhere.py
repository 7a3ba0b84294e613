"""A run on GPUs that are not here: the parts that follow from its configuration alone."""

import math
from functools import cached_property

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from diffusion_lab.backbone.base import layers_of
from diffusion_lab.backbone.macs import seen_flops
from diffusion_lab.build.instantiate import check_keys, instantiate
from diffusion_lab.build.objects import build_model
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import flag, inside, optional, share, whole
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data.source import Absent
from diffusion_lab.diffusion.objective.teacher import TeacherModel
from diffusion_lab.families.diffusion.task import build_task
from diffusion_lab.first_stage.base import FirstStage, Shape
from diffusion_lab.profiling.costs import ImageFacts, calls_of_one_network, cost_of, image_facts
from diffusion_lab.profiling.gpu import GPU
from diffusion_lab.profiling.on_meta import Activations, activations
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
        self.world = self.nodes * self.devices
        self.batch = solve_batch(cfg.batch_size, self.world, cfg.micro_batch_size)
        given = cfg.trainer.precision
        self.precision = "bf16-mixed" if given == "auto" else given
        self.sharded = self.world > 1 and sharded(cfg.trainer)
        self.task = build_task(self.cfg, device="meta")
        if isinstance(self.task.module.objective.teacher, TeacherModel):
            raise UserError(
                "objective/teacher=model is a second network that every step asks, which plan "
                "does not count; plan the run with objective=ect"
            )
        if self.task.module.alignment is not None:
            raise UserError(
                "alignment is a second network that every step asks, which plan does not count; "
                "plan the run with alignment=none"
            )
        self.steps = cfg.trainer.max_steps

    @property
    def strategy(self) -> str:
        """The word for how the model is spread over the GPUs."""
        return "fsdp" if self.sharded else "ddp" if self.world > 1 else "one process"

    @cached_property
    def macs(self) -> int:
        """MACs of a network call on one image."""
        return cost_of(self.cfg, self.facts).macs

    @cached_property
    def calls(self) -> int | None:
        """The network calls of a sample; None if they depend on the trained network."""
        return calls_of_one_network(self.cfg, self.facts)

    @cached_property
    def activations(self) -> Activations:
        """The bytes that a forward pass keeps for the backward pass."""
        again, cfg, plain = self.cfg.activation_checkpointing, self.cfg.copy(), None
        if again:
            cfg.activation_checkpointing = False
            plain = build_model(cfg, *self.facts, "meta")
        model = build_model(self.cfg, *self.facts, "meta")
        layers = layers_of(plain.denoiser.backbone) if plain else []
        try:
            return activations(model, plain, layers, self.precision)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"the activations of {type(model.denoiser.backbone).__name__} cannot be found "
                "without running it; measure them with diffusion-lab profile"
            ) from error

    @cached_property
    def encoding_flops(self) -> int:
        """The FLOPs of encoding an image for a training step; 0 if that is done before training."""
        stage = self.task.module.first_stage
        if stage.cache or stage.of_pixels:
            return 0
        return seen_flops(lambda: stage.moments(self.one_image))

    @property
    def one_image(self) -> Tensor:
        """A black image, uint8 (1, C, H, W)."""
        return torch.zeros(1, *self.facts.shape, dtype=torch.uint8)

    @cached_property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of a training image as it is kept: its own, or of its encoded moments."""
        stage = self.task.module.first_stage
        if not stage.cache:
            return self.facts.shape
        return tuple(stage.moments(self.one_image).shape[1:])

    @property
    def stored_bytes(self) -> int | None:
        """The bytes of all training images as they are kept; None if their number is not known.

        Encoded images are float32, and mirrored ones are kept beside them.
        """
        if self.cfg.num_images is None:
            return None
        copies = 4 * (1 + self.cfg.data.flip) if self.task.module.first_stage.cache else 1
        return self.cfg.num_images * copies * math.prod(self.stored_shape)


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
