"""Times `diffusion-lab compare` on many run folders.

    python experiments/benchmarks/comparison.py RUN [--runs 50] [--compositions 10]

copies one finished run into a temporary folder as many runs of several widths and seeds, whose
metrics differ at random, compares them by the command, and prints seconds and the page's size.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from diffusion_lab.runs.checkpoints import LAST
from diffusion_lab.runs.folder import CONFIG, SUMMARY
from diffusion_lab.runs.results import EVALUATIONS

SPREAD = 0.05  # of the metrics, relative


def copy_of(run: Path, folder: Path, width: int, seed: int) -> None:
    """Copies a run with another width and seed; the checkpoint is linked."""
    ignored = shutil.ignore_patterns("wandb", "*.ckpt", "*.npz")
    shutil.copytree(run, folder, ignore=ignored)
    os.link(run / LAST, folder / LAST)
    config = OmegaConf.load(folder / CONFIG)
    config.backbone.width, config.seed = width, seed
    (folder / CONFIG).write_text(OmegaConf.to_yaml(config))
    draw = random.Random(1000 * width + seed)
    for path in (folder / SUMMARY, *(folder / EVALUATIONS).glob("*.json")):
        content = json.loads(path.read_text())
        for name in content["metrics"]:
            if "_real/" not in name:
                content["metrics"][name] *= 1 + SPREAD * draw.uniform(-1, 1)
        path.write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--compositions", type=int, default=10)
    arguments = parser.parse_args()
    # beside the run, as hard links need the same file system
    with tempfile.TemporaryDirectory(dir=arguments.run.parent) as temporary:
        folder = Path(temporary)
        for number in range(arguments.runs):
            seed, width = divmod(number, arguments.compositions)
            copy_of(arguments.run, folder / "runs" / str(number), width + 1, seed)
        command = [sys.executable, "-m", "diffusion_lab", "compare", str(folder / "runs")]
        start = time.perf_counter()
        subprocess.run([*command, f"output={folder / 'out'}"], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        size = (folder / "out" / "index.html").stat().st_size
    print(
        f"{arguments.runs} runs of {arguments.compositions} compositions: {seconds:.1f} s, "
        f"a page of {size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
