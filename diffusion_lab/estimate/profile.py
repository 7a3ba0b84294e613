"""Profiles compositions: tables of what they cost and how fast they are on this device."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer, timer

from diffusion_lab.assembly.config_keys import Means, groups
from diffusion_lab.assembly.costs import (
    ELSEWHERE,
    ImageFacts,
    RunCost,
    counted,
    image_facts,
    sampling_calls,
)
from diffusion_lab.assembly.instantiate import check_keys, instantiate
from diffusion_lab.assembly.model import LATER, compile_model
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.assembly.parameter_groups import build_optimizer, for_training, inner_matrices
from diffusion_lab.assembly.sentences import Combination
from diffusion_lab.backbone.base import ends_of
from diffusion_lab.backbone.macs import TRAINING_PASSES, by_level, total
from diffusion_lab.common.formats import amount
from diffusion_lab.common.images import to_float
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import whole
from diffusion_lab.compute.device import CHOICES, autocast, device_and_precision, mode_of, pays
from diffusion_lab.data.augmentation import augment
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective import TeacherModel
from diffusion_lab.estimate import budget
from diffusion_lab.estimate.run_cost import activations
from diffusion_lab.runs.opened import inherited, load_diffusion_config

COLUMNS = {
    "params": "params",
    "MACs": "macs",
    "calls": "sampling_calls",
    "bytes": "activation_bytes",
    "train/s": "training_images_per_second",
    "draw/s": "sampling_images_per_second",
}
KINDS = ("training", "network")  # of speeds
ALLOWED = CHOICES | {each: whole(1) for each in ("batch_size", "timed_steps", "depth")}
PATIENCE = 20.0  # seconds of timing after which no further round begins: slow steps vary little
WARM_UP = 2  # steps; the first one allocates
PEAK_SECONDS = 0.3
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # side of the matrices: large enough for full speed
LARGEST_KEPT = 2**25 - 2**16  # bytes, just below the size that glibc always takes from the system
Numbers = dict[str, Any]


def profile(
    cfg: DictConfig, overrides: list[str], combinations: list[Combination]
) -> dict[str, object]:
    """Profiles one composition or several, which are all counted before the first is timed."""
    title = cfg.run or f"backbone={HydraConfig.get().runtime.choices['backbone']}"
    known = [prepared(each.cfg, each.overrides) for each in combinations]
    results = [numbers_of(*each) for each in known]
    for each, (_, _, cost), numbers in zip(combinations, known, results, strict=True):
        show(each.name or title, cost, numbers, each.cfg.depth)
    if len(results) > 1:
        compare([each.name for each in combinations], results)
    return {"profiles": results} if combinations[0].chosen else results[0]


def prepared(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, ImageFacts, RunCost]:
    """A configuration completed by its budget or its run, its images, and what it costs."""
    if cfg.run:
        shared = ("data", *groups(Means.COST))
        cfg = inherited(cfg, load_diffusion_config(cfg.run), shared, overrides)
    else:
        cfg = budget.with_budget(cfg, overrides)
    check_keys(cfg, ALLOWED)
    device, _ = measured_on(cfg)  # raises UserError for a wrong device or precision
    asked = str(OmegaConf.select(cfg, "objective.teacher._target_"))
    if cfg.speed and device.type != "meta" and asked.endswith(f".{TeacherModel.__name__}"):
        raise UserError(
            "objective/teacher=model is a second network that every step asks, which profile does "
            "not time; write speed=false, or ask `diffusion-lab doctor`, which does"
        )
    facts = image_facts(cfg)
    return cfg, facts, counted(cfg, facts, sampling_calls(cfg, facts))


def measured_on(cfg: DictConfig) -> tuple[torch.device, str]:
    """The device and precision to measure with; raises UserError if either is not available."""
    if cfg.device == "meta":
        return torch.device("meta"), "32-true"
    return device_and_precision(cfg.device, cfg.precision)


def numbers_of(cfg: DictConfig, facts: ImageFacts, cost: RunCost) -> Numbers:
    """The counts, and how fast a composition is on a device, and how near to the device's peak."""
    numbers = {
        "image_shape": facts.shape,
        "num_classes": facts.labels.classes,
        "params": cost.parameters,
        "macs": cost.macs,
        "training_macs": round(cost.training_share * cost.macs),
        "flops": cost.flops(),
        "flop_counter": cost.seen_flops,
        "sampling_calls": cost.calls,
        "modules": [asdict(each) for each in cost.modules],
    }
    if not cfg.speed or cfg.device == "meta":
        return numbers
    device, precision = measured_on(cfg)
    bench = Bench(cfg, facts, device, precision)
    bench.compile(cfg.compile)
    step, call = (median_seconds([work], cfg.timed_steps)[0] for work in (bench.train, bench.call))
    peak, kept = peak_flops(precision, device), activations(cfg, facts, precision).kept
    work = cfg.batch_size * cost.flops() / peak  # seconds that a call takes at the peak
    return numbers | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "batch_size": cfg.batch_size,
        "activation_bytes": kept(2) - kept(1),
        "training_images_per_second": cfg.batch_size / step,
        "network_images_per_second": cfg.batch_size / call,
        "sampling_images_per_second": cfg.batch_size / call / cost.calls if cost.calls else None,
        "peak_flops": peak,
        "training_share_of_peak": TRAINING_PASSES * cost.training_share * work / step,
        "network_share_of_peak": work / call,
    }


def show(name: str, cost: RunCost, numbers: Numbers, depth: int) -> None:
    """Prints the table of modules, and lines on the entire model and on how fast it is."""
    shape = "x".join(map(str, numbers["image_shape"]))
    table = Table("module", title=f"{name} on {shape}, {numbers['num_classes']} classes")
    for column in ("parameters", "share", "MACs", "share"):
        table.add_column(column, justify="right")
    rows = by_level(cost.modules, depth)
    whole = total(rows, "all")
    for row in (*rows, whole):
        share, of_macs = row.params / max(whole.params, 1), row.macs / max(whole.macs, 1)
        cells = amount(row.params), f"{share:.1%}", amount(row.macs), f"{of_macs:.1%}"
        table.add_row(row.name, *cells, end_section=row is rows[-1])
    console.print(table)
    say(
        f"{amount(cost.macs)} MACs, {amount(cost.flops())} FLOPs; "
        f"PyTorch counts {amount(cost.seen_flops)}"
    )
    if cost.training_share != 1:
        say(f"In training: {amount(numbers['training_macs'])} MACs, as patches are routed")
    if cost.calls is not None:
        say(f"Network calls per sample: {cost.calls:,}")
    if any(module.name == ELSEWHERE for module in cost.modules):
        say(
            f"MACs {ELSEWHERE} were seen by PyTorch but counted by no module; add a method "
            "mixing_macs(*forward_inputs) to the module that multiplies outside of its layers"
        )
    if "device" not in numbers:
        return
    say(
        "On {device} in {precision}, batch {batch_size}; peak ".format(**numbers)
        + f"{amount(numbers['peak_flops'])} FLOP/s in matrix products and convolutions"
    )
    shares = {kind: f"{numbers[f'{kind}_share_of_peak']:.0%} of the peak" for kind in KINDS}
    rates = {kind: amount(numbers[f"{kind}_images_per_second"]) for kind in KINDS}
    say(f"Training: {rates['training']} images/s, {shares['training']}")
    say(f"Activations: {amount(numbers['activation_bytes'])} bytes per image")
    say(f"A network call: {rates['network']} images/s, {shares['network']}")
    if speed := numbers["sampling_images_per_second"]:
        say(f"Sampling: {amount(speed)} images/s")


def compare(names: list[str], results: list[Numbers]) -> None:
    """Prints one table, a row per composition, with the columns that were measured for all."""
    columns = {t: key for t, key in COLUMNS.items() if all(key in each for each in results)}
    caption = "bytes: activations per image; train/s, draw/s: images per second"
    table = Table("composition", caption=caption if "bytes" in columns else None)
    for title in columns:
        table.add_column(title, justify="right")
    for name, numbers in zip(names, results, strict=True):
        values = [numbers[key] for key in columns.values()]
        table.add_row(name, *(amount(v) if isinstance(v, int | float) else "" for v in values))
    console.print(table)


class Bench:
    """The model of a configuration and random images on a device; steps do not clip or average."""

    def __init__(self, cfg: DictConfig, facts: ImageFacts, device: torch.device, precision: str):
        self.device = device
        if device.type == "cpu":
            # once a block this large is freed, glibc keeps freed memory, as it does in training;
            # without this, times would depend on what was measured before
            torch.empty(LARGEST_KEPT, dtype=torch.uint8)
        self.autocast = autocast(precision, device)
        self.model = build_model(cfg, *facts, str(device))
        own = self.model.denoiser, self.model.schedule
        self.alignment = instantiate(cfg, "alignment")(*own) if cfg.get("alignment") else None
        parts = {"denoiser": self.model.denoiser, "objective": self.model.objective}
        if self.alignment is not None:
            parts["alignment"] = self.alignment
            if self.alignment.extractor is not None:  # a frozen network, which is no module of it
                self.alignment.extractor.to(device)
        self.parts = nn.ModuleDict(parts).to(device)
        if pays(cfg.channels_last, device):
            cast(Any, self.model.denoiser).to(memory_format=torch.channels_last)
        backbone = self.model.denoiser.backbone
        hidden = inner_matrices(backbone, ends_of(backbone))
        self.optimizer = build_optimizer(cfg)(self.parts, self.parameters(), hidden)
        size = (cfg.batch_size, *facts.shape)
        self.images = torch.randint(256, size, dtype=torch.uint8, device=device)
        self.labels = facts.labels.blank(cfg.batch_size, device)
        self.noise = torch.randn(cfg.batch_size, *self.model.denoiser.image_shape, device=device)
        self.level = self.model.schedule(torch.tensor(0.5))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [*self.parts.parameters()]

    def compile(self, choice: bool | str) -> None:
        """Compiles the network as training would."""
        if pays(choice, self.device):
            compile_model(self.model.denoiser, self.model.objective, mode_of(choice))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, (), of images (b, C, H, W) uint8 with labels (b,)."""
        with self.autocast:
            images, augmentation = augment(self.model.augmentation, images)
            first_stage = self.model.first_stage
            x0 = first_stage.draw(first_stage.moments(images))
            given = Given(labels, augmentation=augmentation)
            losses = self.model.objective(self.model.denoiser, x0, given, images_seen=LATER)
            loss = losses.minimised.mean()
            if self.alignment is not None:
                value = self.alignment(to_float(images))
                loss = loss + self.alignment.weight * self.alignment.loss(value)
            return loss

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
    begun = timer()
    for _ in range(WARM_UP + times):
        for step, taken in zip(steps, seconds, strict=True):
            start = timer()  # waits for a GPU
            step()
            taken.append(timer() - start)
        if timer() - begun > PATIENCE:
            break
    return [statistics.median(taken[WARM_UP:] or taken) for taken in seconds]


@torch.inference_mode()
def peak_flops(precision: str, device: torch.device) -> float:
    """The device's peak FLOP/s, measured by the fastest of matrix products and convolutions."""
    size = PEAK_SIZE[device.type]
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
