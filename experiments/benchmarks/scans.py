"""Speed and memory of our state spaces against mambapy's parallel and sequential scans.

    python experiments/benchmarks/scans.py [--rounds 3] [--tokens 64 256 1024]

Six layers of width 384 (16 states, convolution of 4, expansion 2), float32, one thread, forward and
backward. All sides take turns, round after round in one process; images per second are of CPU time,
and ratios are taken within a round. Memory is the growth of a process's peak in one step, with each
side in a process of its own. Needs `pip install mambapy`. Writes scans.json and scans.md into
--out.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mambapy.mamba import Mamba as MambaPy
from mambapy.mamba import MambaConfig
from torch import Tensor, nn

from diffusion_lab.backbone.mamba import MambaMixer
from diffusion_lab.backbone.state_space import S6, SSD

WIDTH, DEPTH = 384, 6
BATCH = {64: 4, 256: 4, 1024: 2}  # batch size by number of tokens


class Ours(nn.Module):
    """Mixers with norms and residual connections, as mambapy's stack has them."""

    def __init__(self, scan: Callable[[int], nn.Module]):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(DEPTH))
        self.mixers = nn.ModuleList(MambaMixer(WIDTH, 2, 4, scan) for _ in range(DEPTH))
        for module in self.modules():
            if initialise := getattr(module, "initialise", None):
                initialise()

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x


def theirs(parallel: bool) -> nn.Module:
    return MambaPy(MambaConfig(d_model=WIDTH, n_layers=DEPTH, pscan=parallel))


SIDES = {
    "ours, S6": lambda: Ours(partial(S6, state=16)),
    "ours, SSD with 16 states": lambda: Ours(partial(SSD, state=16, head_channels=64)),
    "ours, SSD with 64 states": lambda: Ours(partial(SSD, state=64, head_channels=64)),
    "mambapy, parallel": lambda: theirs(parallel=True),
    "mambapy, sequential": lambda: theirs(parallel=False),
}
REFERENCE = "mambapy, parallel"


def step(network: nn.Module, tokens: int) -> None:
    network(torch.ones(BATCH[tokens], tokens, WIDTH)).sum().backward()


def seconds(network: nn.Module, tokens: int) -> float:
    begin = time.process_time()
    step(network, tokens)
    return time.process_time() - begin


def peak() -> float:
    """Returns this process's peak memory in MiB (Linux)."""
    # not getrusage, whose peak a process inherits from the one that started it
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def peak_growth(side: str, tokens: int, answer: multiprocessing.Queue) -> None:
    """Measures by how many MiB a step raises this process's peak memory."""
    torch.set_num_threads(1)
    network = SIDES[side]()
    before = peak()
    step(network, tokens)
    answer.put(peak() - before)


def memory(side: str, tokens: int) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak_growth, args=(side, tokens, answer))
    process.start()
    result = answer.get()
    process.join()
    return result


def measure(tokens: int, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    networks = {side: build() for side, build in SIDES.items()}
    for network in networks.values():
        step(network, tokens)
    times = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, network in networks.items():
            times[side].append(seconds(network, tokens))
    rows = []
    for side in SIDES:
        ratios = [by / own for by, own in zip(times[REFERENCE], times[side], strict=True)]
        rows.append(
            {
                "tokens": tokens,
                "side": side,
                "images_per_cpu_second": BATCH[tokens] / statistics.median(times[side]),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "memory_mib": memory(side, tokens),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| tokens | side | images / CPU s | by mambapy's parallel scan | peak memory, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["ratio_range"]
        lines.append(
            f"| {row['tokens']} | {row['side']} | {row['images_per_cpu_second']:.2f} "
            f"| {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | {row['memory_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for tokens in arguments.tokens:
        rows += measure(tokens, arguments.rounds)
        print(table(rows[-len(SIDES) :]), flush=True)
    (arguments.out / "scans.json").write_text(json.dumps(rows, indent=1))
    (arguments.out / "scans.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
