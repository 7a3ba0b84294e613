"""How long the commands take to answer, as whole processes on one core.

    taskset -c 0 python experiments/benchmarks/answers.py RUN [--rounds 3]

RUN is a finished run of `make train`. Prints wall-clock seconds, the median and the range over the
rounds, in which all commands take turns.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffusion_lab.common.formats import markdown_table


def commands(run: str, folder: Path) -> dict[str, list[str]]:
    """The command lines that are timed, by what the table calls them."""
    return {
        "`--help`": ["--help"],
        "`train --help`": ["train", "--help"],
        "`status`": ["status", str(Path(run).parent)],
        "the list of studies": ["study"],
        "a mistyped override": ["train", "backbone=dlt"],
        "four samples": ["sample", f"run={run}", "num_samples=4", f"output={folder}/samples"],
        "`compare` of one run": ["compare", run, f"output={folder}/page"],
    }


def seconds(command: list[str]) -> float:
    """The wall-clock seconds of a command, whatever its exit code."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "diffusion_lab", *command], capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = commands(options.run, Path(folder))
        taken = {name: [] for name in lines}
        for _ in range(options.rounds):
            for name, line in lines.items():
                taken[name].append(seconds(line))
    rows = [
        [name, f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"]
        for name, times in taken.items()
    ]
    print(markdown_table(["command", "seconds"], rows))


if __name__ == "__main__":
    main()
