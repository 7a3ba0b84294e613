"""The cost of a training run: parameters, multiply-accumulates (MACs), calls, bytes and seconds."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffusion_lab.assembly.config_keys import CLASS
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.model import Model
from diffusion_lab.assembly.objects import build_images, build_model, build_pipeline
from diffusion_lab.backbone import macs
from diffusion_lab.backbone.conditioning import Condition, RawLabels
from diffusion_lab.backbone.macs import Cost
from diffusion_lab.common.formats import amount
from diffusion_lab.common.labels import Classes, Labels
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import IMAGE_SHAPE, optional, whole
from diffusion_lab.diffusion.estimate import Estimate, Given

ELSEWHERE = "outside of all layers"  # MACs of no layer, such as attention of another library


class ImageFacts(NamedTuple):
    """The shape (C, H, W) of the images that a model is for, and what their labels are."""

    shape: tuple[int, int, int]
    labels: Labels


def image_facts(cfg: DictConfig) -> ImageFacts:
    """The images' shape and their labels: as configured, else the data's."""
    check_keys(cfg, {"image_shape": optional(IMAGE_SHAPE), "num_classes": optional(whole(0))})
    shape, classes = cfg.get("image_shape"), cfg.get("num_classes")  # training has neither
    labels: Labels = Classes.numbered(classes or 0)
    if shape is None or classes is None:
        data = build_images(cfg)
        shape = data.image_shape if shape is None else shape
        labels = data.labels if classes is None else labels
    channels, height, width = shape
    return ImageFacts((channels, height, width), labels)


@dataclass(frozen=True)
class Memory:
    """Bytes of a device by what they are for, of rank 0, whose shares are the largest."""

    parameters: int
    gradients: int
    optimizer: int
    temporary: int  # of an optimiser's step that is not fused
    averages: int
    gathered: int  # of FSDP: the layers that are whole at one time
    first_stage: int
    images: int
    activations: int  # of a micro-batch

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class RunCost:
    """The cost of a training run, as far as it is known.

    `macs` are those of a network call on one image, of which a call in training may need only a
    `training_share`. A training step costs as much as `passes` calls out of training (None if they
    are not counted). A sample takes `calls` of them (None if that depends on the trained network).
    `memory` is a device's. `step` is the seconds of a training step, and `call` those of a network
    call on an image while all devices work, measured or predicted.
    """

    macs: int
    training_share: float
    parameters: int
    passes: float | None
    modules: list[Cost]  # without their children; MACs of no module are named ELSEWHERE
    seen_flops: int  # by PyTorch, of a call on one image
    calls: int | None = None
    memory: Memory | None = None
    step: float | None = None
    call: float | None = None

    def __str__(self) -> str:
        return f"{amount(self.parameters)} parameters, {amount(self.macs)} MACs per network call"

    def flops(self) -> int:
        """The FLOPs of a network call on an image."""
        return 2 * self.macs


def counted(cfg: DictConfig, facts: ImageFacts, calls: int | None = None) -> RunCost:
    """The cost of a run, whose network is on "meta"; `calls` are those of a sample."""
    try:
        model, modules, trained, seen = counted_on("meta", cfg, facts)
    except RuntimeError:  # a custom network that reads the values of its tensors
        model, modules, trained, seen = counted_on("cpu", cfg, facts)
    saved = macs.total(modules).macs - macs.total(trained).macs
    left_out = seen // 2 - macs.total(modules).macs
    if left_out > 0:  # the package's networks leave out nothing, but count more than PyTorch sees
        modules.append(Cost(ELSEWHERE, 0, left_out))
    whole, extra = macs.total(modules), model.objective.extra_passes(model.denoiser)
    share = 1 - saved / whole.macs if saved else 1.0
    return RunCost(
        macs=whole.macs,
        training_share=share,
        parameters=whole.params,
        passes=None if extra is None else (macs.TRAINING_PASSES + extra) * share,
        modules=[each for each in modules if each.params or each.macs],
        seen_flops=seen,
        calls=calls,
    )


def counted_on(
    device: str, cfg: DictConfig, facts: ImageFacts
) -> tuple[Model, list[Cost], list[Cost], int]:
    """A model, its modules' costs for an image out of training and in it, and PyTorch's FLOPs."""
    model = build_model(cfg, *facts, device=device)
    x = torch.zeros(1, *model.denoiser.image_shape, device=device)
    labels = model.denoiser.conditioning.labels.blank(1, device)
    level = model.schedule(torch.tensor([0.5]))

    def call() -> Estimate:
        return model.denoiser(x, level, Given(labels))

    trained = macs.count(model.denoiser, call)
    model.denoiser.eval()
    return model, macs.count(model.denoiser, call), trained, macs.seen_flops(call)


class CountingBackbone(nn.Module):
    """A backbone that returns zeros, and counts the images that it is called on."""

    condition_width = 4

    def __init__(
        self, in_channels: int, out_channels: int, image_size: tuple[int, int], embeds_labels: bool
    ):
        super().__init__()
        self.out_channels = out_channels
        self.embeds_labels = embeds_labels  # as the network does in whose place this is
        self.asked = 0

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        self.asked += len(x)
        return x.new_zeros(len(x), self.out_channels, *x.shape[2:])


def calls_of_one_network(cfg: DictConfig, facts: ImageFacts) -> int | None:
    """The sampling calls, or None where they are not known or a second network is asked, too."""
    second = cfg.guidance.get("weak_run") or cfg.guidance.get("classifier")
    return None if second else sampling_calls(cfg, facts)


def sampling_calls(cfg: DictConfig, facts: ImageFacts) -> int | None:
    """Network calls for an image, with sampler and guidance; None if the sampler is adaptive."""
    for key in ("weak_run", "classifier"):
        if cfg.guidance.get(key):
            raise UserError(
                f"guidance.{key} is a second network, which profile does not measure; write "
                "guidance=none"
            )
    cfg = cfg.copy()
    counting = {"_target_": f"{__name__}.{CountingBackbone.__name__}", "_partial_": True}
    conditioning = OmegaConf.select(cfg, f"conditioning.{CLASS}")
    counting |= {"embeds_labels": str(conditioning).endswith(f".{RawLabels.__name__}")}
    OmegaConf.update(cfg, "backbone", counting, merge=False)
    cfg.activation_checkpointing = False  # of layers, which this one lacks
    model = build_model(cfg, *facts)
    pipeline = build_pipeline(cfg, model, facts.labels)
    if pipeline.sampler.adaptive:
        return None
    with torch.inference_mode():
        denoise = pipeline.guidance.bind(model.denoiser, pipeline.labels([0]))
        pipeline.sampler(denoise, torch.randn(1, *model.denoiser.image_shape), model.schedule)
    assert isinstance(model.denoiser.backbone, CountingBackbone)
    return model.denoiser.backbone.asked
