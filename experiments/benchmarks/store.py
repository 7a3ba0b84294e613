"""The speed of batches from a mapped file, beside the same batches from memory, in turns.

    python experiments/benchmarks/store.py [--rounds 15] [--threads 1] [--folder FOLDER]

Each set has random values. A turn is an epoch of shuffled batches of 128, as training takes them.
Prints batches per CPU second, and the ratio of the turns of a round: its median and range. The
first turn of a file, whose pages are in the page cache but not yet mapped, is given by itself.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.common.formats import markdown_table
from diffusion_lab.data.loader import TensorLoader
from diffusion_lab.data.store import Allocate, StoredValues, in_memory, stored

BATCH = 128
SETS = {
    "FashionMNIST, 60,000 of 1 x 28 x 28": ((60_000, 1, 28, 28), torch.uint8),
    "CIFAR-10, 50,000 of 3 x 32 x 32": ((50_000, 3, 32, 32), torch.uint8),
    "40,000 of 3 x 64 x 64": ((40_000, 3, 64, 64), torch.uint8),
    "5,000 of 3 x 256 x 256": ((5_000, 3, 256, 256), torch.uint8),
    "moments, 15,000 of 8 x 32 x 32, float32": ((15_000, 8, 32, 32), torch.float32),
}


def filled(shape: tuple[int, ...], dtype: torch.dtype, allocate: Allocate) -> StoredValues:
    """Random values, the same in memory and in a file."""
    values, generator = allocate(shape, dtype), torch.Generator().manual_seed(0)
    for part in values.split(1000):
        part.random_(0, 256, generator=generator)
    return StoredValues(values, {})


def epoch(values: Tensor, index: int) -> float:
    """CPU seconds of an epoch of batches."""
    loader = TensorLoader(values, torch.zeros(len(values), dtype=torch.int64), BATCH, seed=0)
    first = index * len(values) // BATCH * BATCH
    loader.batch_at(first)  # draws the order
    begin = time.process_time()
    for start in range(first, first + len(values), BATCH):
        loader.batch_at(start)
    return time.process_time() - begin


def compared(name: str, folder: Path, rounds: int) -> list[str]:
    """Measures one set; returns a row of the table."""
    make = partial(filled, *SETS[name])
    kept, mapped = make(in_memory).values, stored(folder, "benchmark", {"set": name}, make).values
    assert torch.equal(kept[-100:], mapped[-100:])
    cold = epoch(mapped, 0)
    epoch(kept, 0)
    ratios, memory, file = [], [], []
    for index in range(1, rounds + 1):
        turns = [(kept, memory), (mapped, file)]
        for values, times in turns if index % 2 else turns[::-1]:
            times.append(epoch(values, index))
        ratios.append(memory[-1] / file[-1])
    batches = len(kept) / BATCH
    speed = [batches / statistics.median(times) for times in (memory, file)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    first = f"{statistics.median(memory) / cold:.2f}"
    return [name, *(f"{each:,.0f}" for each in speed), ratio, first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, default=None, help="of the files, removed at the end"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in SETS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(compared(name, Path(folder), options.rounds))
            print(rows[-1], flush=True)
    header = ["set", "memory, batches/s", "file, batches/s", "ratio", "ratio of the first turn"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
