"""The denoiser: a network and its prediction type become an estimate of the clean image.

A checkpoint needs to contain nothing else.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from diffusion_lab.common.labels import Labels
from diffusion_lab.common.ranges import Flag, above, one_of, optional, ranges
from diffusion_lab.diffusion.estimate import NOTHING, Estimate, Given
from diffusion_lab.diffusion.noise import NoiseLevel, broadcast, features
from diffusion_lab.diffusion.objective.prediction import Prediction

# How the noise level is passed to a network, as a float of at most a few hundred in magnitude.
NOISE_LABELS: dict[str, Callable[[NoiseLevel], Tensor]] = {
    "time": lambda level: 1000 * level.t,
    "index": lambda level: 1000 * level.t - 1,  # DDPM's and DiT's table index
    "data_time": lambda level: 1 - level.t,  # SiT's time, 1 on clean data
    "log_sigma": lambda level: (level.sigma / level.alpha).log() / 4,  # EDM's c_noise
}

FEATURES = 64  # Fourier features of each level of a jump, and of a scale of guidance


def check_interface(network: Any) -> None:
    """Raises ValueError for a network that cannot be asked as all networks are."""
    name = type(network).__name__
    if not isinstance(getattr(network, "condition_width", None), Integral):
        raise ValueError(
            f"backbone={name} needs a whole number `condition_width`, the width of the vectors "
            "that its forward gets in `condition`"
        )
    try:
        inspect.signature(network.forward).bind(None, None, None)
    except TypeError as error:
        raise ValueError(f"backbone={name}.forward must take (x, noise, condition)") from error


class TargetEmbedding(nn.Module):
    """The level that a step comes from and the one it goes to, as a vector (B, width).

    With `scaled` the scale of a guidance is part of it, too. At the start of training it is 0, so a
    network that cannot jump yet is not disturbed. `base_width` is that of a network under muP.
    """

    def __init__(self, width: int, scaled: bool = False, base_width: int | None = None):
        super().__init__()
        self.scaled, self.base_width = scaled, base_width
        self.first = nn.Linear((2 + scaled) * FEATURES, width)
        self.last = nn.Linear(width, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def rates(self) -> dict[nn.Parameter, float]:
        """The factors of Adam's rate for parameters under muP, as a network has them."""
        weight = self.last.get_parameter("weight")
        return {} if self.base_width is None else {weight: self.base_width / len(weight)}

    def forward(self, level: NoiseLevel, scale: Tensor | None, count: int) -> Tensor:
        """A level () or (B,), whose `there` is itself if None; `scale` (B,) is 1 if None."""
        positions = [level.t, level.t if level.there is None else level.there.t]
        if self.scaled:
            positions.append(torch.zeros(1) if scale is None else 1 - 1 / scale)
        device = self.first.weight.device
        parts = [features(each.reshape(-1), FEATURES, device) for each in positions]
        told = torch.cat([part.expand(count, -1) for part in parts], 1)
        return self.last(nn.functional.silu(self.first(told)))


def is_compiled(network: nn.Module) -> bool:
    """Whether torch.compile has compiled a network, or its layers."""
    layers = getattr(network, "layers", None)
    first = layers[0] if isinstance(layers, list | nn.ModuleList) and layers else network
    return any(getattr(part, "_compiled_call_impl", None) for part in (network, first))


def in_few_graphs(network: nn.Module, x: Tensor, noise: Tensor, condition: Any) -> Tensor:
    """The answer of a network, for which torch.compile makes one graph a gradient and one without.

    A graph is for tensors of one kind, of inference mode or not, and for batches of one size or of
    any: validation, samples and their last batches would have a graph each.
    """
    if torch.is_grad_enabled() or not is_compiled(network):
        return network(x, noise, condition)
    with torch.inference_mode(False), torch.no_grad():
        tensors = {key: value for key, value in vars(condition).items() if value is not None}
        x, noise, *parts = (each.clone() for each in (x, noise, *tensors.values()))
        for each in (x, noise, *parts):
            torch._dynamo.maybe_mark_dynamic(each, 0)
        return network(x, noise, replace(condition, **dict(zip(tensors, parts, strict=True))))


class Denoiser(nn.Module):
    """Any backbone with any prediction type.

    image_shape is the (C, H, W) to diffuse. `input_std`, if given, is the standard deviation
    of clean data, and the network's input is scaled to unit variance with it (EDM's c_in). With
    `self_conditioning` the network also sees the previous estimate (arXiv:2208.04202);
    with `learned_variance` it has a second output for the reverse variance (arXiv:2102.09672).
    `clip`, if given, is the largest magnitude of clean data: the estimate of x0 is clamped to
    [-clip, clip], and the objective counts no error beyond a limit that the data is at.
    `augmentation_labels` is the number of values that describe an image's augmentation, if any do.
    With `jumps` the network is also told the level that a step goes to, and its answer is the x0
    with which the step ends on the exact path; without one it is the denoised estimate. With
    `told_scale` it is told a scale of guidance besides.
    """

    @ranges(noise_label=one_of(*NOISE_LABELS))
    def __init__(
        self,
        backbone: Callable[..., nn.Module],
        conditioning: Callable[..., nn.Module],
        prediction: Prediction,
        image_shape: tuple[int, int, int],
        labels: Labels,
        noise_label: str = "time",
        input_std: Annotated[float | None, optional(above(0))] = None,
        self_conditioning: Flag = False,
        learned_variance: bool = False,
        clip: Annotated[float | None, optional(above(0))] = None,
        augmentation_labels: int = 0,
        jumps: Flag = False,
        told_scale: Flag = False,
    ):
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = tuple(image_shape)
        self.prediction = prediction
        self.noise_label = NOISE_LABELS[noise_label]
        self.input_std = input_std
        self.self_conditioning = self_conditioning
        self.learned_variance = learned_variance
        self.clip = clip
        if not callable(backbone):
            raise ValueError("backbone must be a class with its settings: it lacks _target_")
        network: Any = backbone(
            in_channels=channels * (1 + self_conditioning),
            out_channels=channels * (1 + learned_variance),
            image_size=(height, width),
        )
        check_interface(network)
        self.backbone: nn.Module = network
        self.conditioning: Any = conditioning(labels=labels, width=network.condition_width)
        if adapt := getattr(network, "adapt", None):
            adapt(self.conditioning)
        self.augmentation = None
        if augmentation_labels:
            # without a bias, so that an unchanged image adds nothing
            self.augmentation = nn.Linear(augmentation_labels, network.condition_width, bias=False)
            nn.init.normal_(self.augmentation.weight, std=0.02)
        base_width = getattr(network, "base_width", None)
        told = TargetEmbedding(network.condition_width, told_scale, base_width) if jumps else None
        self.target = told

    def forward(self, x: Tensor, level: NoiseLevel, given: Given = NOTHING) -> Estimate:
        """The denoised estimate of x (B, C, H, W) at `level`."""
        output, weight = self._ask(x, level, given), None
        if self.learned_variance:
            output, weight = output.chunk(2, 1)
            weight = (weight + 1) / 2
        x0 = self.prediction.to_x0(output, x, level)
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        return Estimate(x0, weight, output)

    def _ask(self, x: Tensor, level: NoiseLevel, given: Given) -> Tensor:
        """The network's output, float32 at least."""
        # float32 whatever autocast says: bf16 has 507 distinct values below 1000
        noise = self.noise_label(level).to(torch.float32)
        if noise.ndim == 0:  # filled in place: a copy from the CPU would wait for a GPU
            noise = torch.full((len(x),), noise.item(), dtype=torch.float32, device=x.device)
        else:
            noise = noise.to(x.device)
        if self.input_std is not None:
            total_std = (level.alpha**2 * self.input_std**2 + level.sigma**2).sqrt()
            x = x / broadcast(total_std, x)
        if self.self_conditioning:
            previous = torch.zeros_like(x) if given.previous is None else given.previous.to(x)
            x = torch.cat([x, previous], 1)
        condition = self.conditioning(given.labels, len(x))
        if self.augmentation is not None:
            weight = self.augmentation.weight  # (D, values)
            values = given.augmentation
            if values is None:
                values = weight.new_zeros(len(x), weight.shape[1])
            condition = condition.joined(self.augmentation(values.to(weight)))
        if self.target is not None:
            condition = condition.joined(self.target(level, given.scale, len(x)))
        output = in_few_graphs(self.backbone, x, noise, condition)
        # at least float32 before to_x0, which may multiply its rounding by a hundred
        # a copy: the next call of a compiled network may write to the memory of its answers
        compiled = self.backbone._compiled_call_impl is not None
        return output.to(torch.promote_types(x.dtype, torch.float32), copy=compiled)
