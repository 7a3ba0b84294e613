"""A run on GPUs that are not here: the parts that follow from its configuration alone."""

import math

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from diffusion_lab.backbone.macs import seen_flops
from diffusion_lab.build.costs import ImageFacts, image_facts
from diffusion_lab.build.instantiate import check_keys, instantiate
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import flag, inside, optional, share, whole
from diffusion_lab.compute.batch import solve_batch
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data.loader import FREE_MEMORY_SHARE
from diffusion_lab.data.source import Absent
from diffusion_lab.diffusion.objective.teacher import TeacherModel
from diffusion_lab.estimate.gpu import GPU
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
        asked = isinstance(module.objective.teacher, TeacherModel), module.alignment is not None
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
