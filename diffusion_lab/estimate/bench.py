"""Measures a model on this device: the seconds of a step, and the device's peak."""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.benchmark import Timer, timer

from diffusion_lab.assembly.costs import ImageFacts
from diffusion_lab.assembly.model import LATER
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.assembly.parameter_groups import build_optimizer, for_training, inner_matrices
from diffusion_lab.backbone import Energy
from diffusion_lab.backbone.base import ends_of
from diffusion_lab.common.ranges import whole
from diffusion_lab.compute.device import CHOICES, autocast, device_and_precision, mode_of, pays
from diffusion_lab.data.augmentation import augment
from diffusion_lab.diffusion.estimate import Given

ALLOWED = CHOICES | {"batch_size": whole(1), "timed_steps": whole(1)}
WARM_UP = 2  # steps; the first one allocates
PEAK_SECONDS = 0.3
PEAK_SIZE = {"cpu": 1024}  # side of the matrices: large enough for full speed
LARGE_PEAK_SIZE = 8192
LARGEST_KEPT = 2**25 - 2**16  # bytes, just below the size that glibc always takes from the system


def measured_on(cfg: DictConfig) -> tuple[torch.device, str]:
    """The device and precision to measure with; raises UserError if either is not available."""
    if cfg.device == "meta":
        return torch.device("meta"), "32-true"
    return device_and_precision(cfg.device, cfg.precision)


class Bench:
    """The model of a configuration and a batch of random images on a device.

    Steps are as in training, without gradient clipping and weight averaging.
    """

    def __init__(self, cfg: DictConfig, facts: ImageFacts, device: torch.device, precision: str):
        self.device = device
        if device.type == "cpu":
            # once a block this large is freed, glibc keeps freed memory, as it does in training;
            # without this, times would depend on what was measured before
            torch.empty(LARGEST_KEPT, dtype=torch.uint8)
        self.autocast = autocast(precision, device)
        self.model = build_model(cfg, *facts, str(device))
        self.model.objective.to(device)
        if pays(cfg.channels_last, device):
            self.model.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parts = nn.ModuleDict({"denoiser": self.model.denoiser, "objective": self.model.objective})
        backbone = self.model.denoiser.backbone
        hidden = inner_matrices(backbone, ends_of(backbone))
        self.optimizer = build_optimizer(cfg)(parts, self.parameters(), hidden)
        size = (cfg.batch_size, *facts.shape)
        self.images = torch.randint(256, size, dtype=torch.uint8, device=device)
        self.labels = facts.labels.blank(cfg.batch_size, device)
        self.noise = torch.randn(cfg.batch_size, *self.model.denoiser.image_shape, device=device)
        self.level = self.model.schedule(torch.tensor(0.5))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [*self.model.denoiser.parameters(), *self.model.objective.parameters()]

    def compile(self, choice: bool | str) -> None:
        """Compiles the backbone as training would."""
        backbone, objective = self.model.denoiser.backbone, self.model.objective
        derived = objective.loss.forward_mode or isinstance(backbone, Energy)
        if pays(choice, self.device) and not derived:
            backbone.compile(mode=mode_of(choice))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, (), of images (b, C, H, W) uint8 with labels (b,)."""
        with self.autocast:
            images, augmentation = augment(self.model.augmentation, images)
            first_stage = self.model.first_stage
            x0 = first_stage.draw(first_stage.moments(images))
            given = Given(labels, augmentation=augmentation)
            losses = self.model.objective(self.model.denoiser, x0, given, images_seen=LATER)
            return losses.minimised.mean()

    def train(self) -> None:
        """Takes one training step."""
        for_training(self.optimizer, True)
        self.loss(self.images, self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def call(self) -> None:
        """Calls the network once, as in sampling: without dropout."""
        self.model.denoiser.eval()
        with self.autocast:
            self.model.denoiser(self.noise, self.level, Given(self.labels))
        self.model.denoiser.train()


def median_seconds(steps: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Median seconds of each step over `times` rounds, in which they take turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    for round_ in range(WARM_UP + times):
        for step, taken in zip(steps, seconds, strict=True):
            start = timer()  # waits for a GPU
            step()
            if round_ >= WARM_UP:
                taken.append(timer() - start)
    return [statistics.median(taken) for taken in seconds]


@torch.inference_mode()
def peak_flops(precision: str, device: torch.device) -> float:
    """The device's peak FLOP/s, measured by the fastest of matrix products and convolutions."""
    size = PEAK_SIZE.get(device.type, LARGE_PEAK_SIZE)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    matrix = torch.randn(size, size, device=device).to(dtype)
    batch, channels, side = size // 256, 256, 32
    images = torch.randn(batch, channels, side, side, device=device).to(dtype)
    images = images.to(memory_format=torch.channels_last)
    kernels = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    # libraries differ: on an AMD CPU float32 convolutions were nearly twice as fast
    work: dict[Callable[[], object], int] = {
        lambda: matrix @ matrix: 2 * size**3,
        lambda: F.conv2d(images, kernels, padding=1): 18 * batch * (side * channels) ** 2,
    }
    speeds = []
    for step, flops in work.items():
        timed = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        speeds.append(flops / min(timed.blocked_autorange(min_run_time=PEAK_SECONDS).times))
    return max(speeds)
