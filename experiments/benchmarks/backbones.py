"""Speed of our U-Net and DiT against other libraries' at equal multiply-accumulates.

    python experiments/benchmarks/backbones.py [--threads 1 2] [--wall] [--rounds 5]
        [--layout channels_first channels_last] [--only dit_s_2] [--device cuda --batch 256]

Trains (forward, backward, AdamW) and samples (forward) with both sides in turn, round after round
in one process, so that other load on the machine affects both; ratios are taken within a round.
Time is CPU time divided by the number of threads, or wall-clock time with --wall and on a GPU,
whose batches must be larger to keep it busy. The layout is
that of the images and kernels given to both sides; our U-Net changes it inside. FLOPs are two per
multiply-accumulate, and a backward pass counts as two forward ones. Against diffusers the networks
are the same, save that our DiT has the exact GELU and diffusers' the tanh form; against
denoising-diffusion-pytorch, whose U-Net no setting of ours reproduces, they have the same levels.
Needs `pip install diffusers denoising-diffusion-pytorch`. Writes backbones.json and backbones.md
into --out.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.backbone import DiT, UNet
from diffusion_lab.backbone.block import AdaLNZero
from diffusion_lab.backbone.conditioning import ClassLabel, Condition
from diffusion_lab.backbone.resample import ConvResampling
from diffusion_lab.backbone.stage import Stage
from diffusion_lab.common.labels import Classes

CLASSES = 10
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


class Ours(nn.Module):
    """A backbone of ours, with class labels or without."""

    def __init__(self, backbone: nn.Module, conditional: bool):
        super().__init__()
        self.backbone = backbone
        self.label = (
            ClassLabel(Classes.numbered(CLASSES), backbone.condition_width) if conditional else None
        )

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        condition = self.label(labels, len(x)) if self.label else Condition()
        return self.backbone(x, noise, condition)


class Theirs(nn.Module):
    """A network of diffusers, which takes labels only if it is a DiT."""

    def __init__(self, network: nn.Module, conditional: bool):
        super().__init__()
        self.network = network
        self.conditional = conditional

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        if self.conditional:
            return self.network(x, noise.long(), class_labels=labels, return_dict=False)[0]
        return self.network(x, noise, return_dict=False)[0]


@dataclass
class Case:
    """The same network on both sides, with the images and the batch size to measure."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int
    library: str = "diffusers"


def our_unet(shape, channels, multipliers, blocks, attention, head_channels) -> Ours:
    """Makes a U-Net of ours without a condition."""
    return Ours(
        UNet(
            shape[0],
            shape[0],
            shape[1:],
            channels=channels,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            attend_once=False,
            patch=1,
            stage=partial(Stage, head_channels=head_channels),
            resample=ConvResampling(),
        ),
        conditional=False,
    )


def unet_case(shape, batch, channels, multipliers, groups) -> Case:
    """Makes a U-Net with two blocks per level and single-head attention at the second level."""
    attended = [level == 1 for level in range(len(multipliers))]
    ours = partial(our_unet, shape, channels, multipliers, 2, [1], None)
    theirs = partial(
        diffusers.UNet2DModel,
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=[channels * multiplier for multiplier in multipliers],
        layers_per_block=2,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        attention_head_dim=None,
        norm_num_groups=groups,
    )
    return Case(ours, lambda: Theirs(theirs(), False), shape, batch)


def dit_case(shape, batch, patch, depth) -> Case:
    """Makes a class-conditional DiT of width 384 with 6 heads and adaLN-Zero."""
    block = partial(AdaLNZero, mlp_ratio=4.0)
    options = {"positions": "sincos", "qk_norm": False, "window": None, "long_skips": False}
    ours = partial(DiT, shape[0], shape[0], shape[1:], patch, 384, depth, 6, block=block, **options)
    theirs = partial(
        diffusers.DiTTransformer2DModel,
        sample_size=shape[1],
        in_channels=shape[0],
        patch_size=patch,
        num_layers=depth,
        num_attention_heads=6,
        attention_head_dim=64,
        num_embeds_ada_norm=CLASSES,
    )
    return Case(lambda: Ours(ours(), True), lambda: Theirs(theirs(), True), shape, batch)


class Lucidrains(nn.Module):
    """The U-Net of denoising-diffusion-pytorch, with full attention only at the coarsest level."""

    def __init__(self):
        super().__init__()
        from denoising_diffusion_pytorch import Unet  # the other cases do without it

        self.network = Unet(64, dim_mults=(1, 2, 4))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, noise)


def lucidrains_case() -> Case:
    """Makes a U-Net of ours with as many multiply-accumulates and attention at the same level."""
    ours = partial(our_unet, (3, 32, 32), 64, (1, 2, 4), 1, [2], 32)
    return Case(ours, Lucidrains, (3, 32, 32), 16, "denoising-diffusion-pytorch")


CASES = {
    "unet_2m": unet_case((1, 28, 28), 64, 32, (1, 2, 3), 8),  # 0.75 GFLOP forward
    "unet_ddpm": unet_case((3, 32, 32), 16, 128, (1, 2, 2, 2), 32),
    "unet_10m": lucidrains_case(),
    "dit_small_28": dit_case((1, 28, 28), 64, 4, 3),
    "dit_small_32": dit_case((3, 32, 32), 64, 4, 3),
    "dit_s_2": dit_case((3, 32, 32), 16, 2, 12),
}


class Runner:
    """One network, its optimiser and one batch."""

    def __init__(
        self, build: Callable[[], nn.Module], case: Case, layout: str, chosen: argparse.Namespace
    ):
        torch.manual_seed(0)
        memory_format, self.device = LAYOUTS[layout], chosen.device
        self.network = build().to(self.device, memory_format=memory_format)
        self.flops = count_flops(build, case)
        self.parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        batch = chosen.batch or case.batch
        x = torch.randn(batch, *case.shape, device=self.device)
        self.x = x.contiguous(memory_format=memory_format)
        self.noise = torch.randint(1000, (batch,), device=self.device).float()
        self.labels = torch.randint(CLASSES, (batch,), device=self.device)
        self.forward = torch.compile(self.network) if chosen.compile else self.network

    def train(self, dtype: torch.dtype) -> None:
        """Takes one optimiser step."""
        with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
            output = self.forward(self.x, self.noise, self.labels)
        (output.float() - self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self, dtype: torch.dtype) -> None:
        """Evaluates the network once, as a sampler would."""
        with torch.no_grad(), torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
            self.forward(self.x, self.noise, self.labels)


def count_flops(build: Callable[[], nn.Module], case: Case) -> int:
    """Counts the FLOPs of a forward pass of one image, which costs nothing on the meta device."""
    with torch.device("meta"):
        network = build().eval()
        x, noise = torch.zeros(1, *case.shape), torch.zeros(1)
        labels = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            network(x, noise, labels)
    return counter.get_total_flops()


def rate(step: Callable[[], None], count: int, seconds: float, clock: Callable[[], float]) -> float:
    """Measures items per second of `step`, which handles `count`, over at least `seconds`.

    A GPU, if one is used, is waited for after 1, 2, 4, ... steps.
    """
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    done, start, steps = 0, clock(), 1
    while (elapsed := clock() - start) < seconds:
        for _ in range(steps):
            step()
        done += steps * count
        if on_gpu:
            torch.cuda.synchronize()
            steps *= 2
    return done / elapsed


def product_peak(
    dtype: torch.dtype, device: str, seconds: float, clock: Callable[[], float]
) -> float:
    """Measures the highest FLOP/s of a square and a layer's matrix product and a convolution."""
    randn = partial(torch.randn, dtype=dtype, device=device)
    many = 1 if device == "cpu" else 8  # times larger on a GPU
    images = randn(8 * many, 256, 32, 32).to(memory_format=torch.channels_last)
    step = partial(F.conv2d, images, randn(256, 256, 3, 3), padding=1)
    step()
    rates = [rate(step, 18 * 8 * many * (32 * 256) ** 2, seconds, clock)]
    for m, k, n in [(2048, 2048, 2048), (4096, 384, 1536)]:
        a, b = randn(m * many, k), randn(k, n)
        step = partial(torch.mm, a, b)
        step()
        rates.append(rate(step, 2 * m * many * k * n, seconds, clock))
    return max(rates)


def measure(name: str, threads: int, layout: str, arguments: argparse.Namespace) -> list[dict]:
    """Measures one row for each precision and mode of a case."""
    torch.set_num_threads(threads)
    case = CASES[name]
    batch = arguments.batch or case.batch
    clock = time.perf_counter
    if not arguments.wall and arguments.device == "cpu":
        clock = lambda: time.process_time() / threads  # noqa: E731
    sides = {
        "ours": Runner(case.ours, case, layout, arguments),
        "theirs": Runner(case.theirs, case, layout, arguments),
    }
    rows = []
    for precision in arguments.precision:
        dtype = PRECISIONS[precision]
        for mode, work in {"training": 3, "inference": 1}.items():
            steps = {
                side: partial(runner.train if mode == "training" else runner.infer, dtype)
                for side, runner in sides.items()
            }
            for step in steps.values():
                step()
                step()
            rates = {side: [] for side in sides}
            peaks = []
            for _ in range(arguments.rounds):
                peaks.append(product_peak(dtype, arguments.device, arguments.seconds / 10, clock))
                for side, step in steps.items():
                    rates[side].append(rate(step, batch, arguments.seconds, clock))
            ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
            row = {
                "case": name,
                "library": case.library,
                "threads": threads,
                "layout": layout,
                "mode": mode,
                "precision": precision,
                "batch": batch,
            }
            for side, runner in sides.items():
                speed = statistics.median(rates[side])
                row[side] = {
                    "images_per_second": speed,
                    "share_of_peak": work * runner.flops * speed / statistics.median(peaks),
                    "parameters": runner.parameters,
                    "flops": runner.flops,
                    "rates": rates[side],
                }
            row["peak"] = statistics.median(peaks)
            row["ratio"] = {
                "median": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
            print(markdown([row]).splitlines()[-1], flush=True)
            rows.append(row)
    return rows


def markdown(rows: list[dict]) -> str:
    """Writes the table: images/s, share of the peak, and the ratio with its range over rounds."""
    lines = [
        "| network | by | params, ours / theirs | GFLOP | threads | layout | mode | precision "
        "| ours | share of peak | theirs | share of peak | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs, ratio = row["ours"], row["theirs"], row["ratio"]
        lines.append(
            f"| {row['case']} | {row['library']} "
            f"| {ours['parameters'] / 1e6:.1f} / {theirs['parameters'] / 1e6:.1f} M "
            f"| {ours['flops'] / 1e9:.2f} / {theirs['flops'] / 1e9:.2f} "
            f"| {row['threads']} | {row['layout']} | {row['mode']} | {row['precision']} "
            f"| {ours['images_per_second']:.1f} | {ours['share_of_peak']:.2f} "
            f"| {theirs['images_per_second']:.1f} | {theirs['share_of_peak']:.2f} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["channels_first"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side in each round")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--wall", action="store_true", help="wall-clock time: a quiet machine only")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="images, instead of the case's own number")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    rows = [
        row
        for name in arguments.only
        for threads in arguments.threads
        for layout in arguments.layout
        for row in measure(name, threads, layout, arguments)
    ]
    machine = {
        "processor": processor() if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **{key: value for key, value in vars(arguments).items() if key != "out"},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"machine": machine, "rows": rows}, indent=1)
    (arguments.out / "backbones.json").write_text(report + "\n")
    (arguments.out / "backbones.md").write_text(markdown(rows))


def processor() -> str:
    """Names the processor where Linux does, and the matrix units that matter."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((line.split(": ")[1] for line in text.splitlines() if "model name" in line), "")
    units = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return f"{name or platform.processor()} {' '.join(units)}"


if __name__ == "__main__":
    main()
