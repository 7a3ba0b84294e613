"""Prints the learning rate of the run with the lowest FID of its evaluation.

python experiments/families/best_rate.py RUN RUN ...
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from diffusion_lab.common.files import read_json


def fid_of(run: Path) -> float:
    """The FID of a run's only evaluation; infinite without one."""
    (record,) = (run / "evaluations").glob("*.json")
    values = read_json(record)["metrics"]
    return next((v for name, v in values.items() if name.startswith("fid/")), float("inf"))


if __name__ == "__main__":
    tried = {run: fid_of(run) for run in map(Path, sys.argv[1:])}
    for run, fid in tried.items():
        print(f"{run}: FID {fid:.1f}", file=sys.stderr)
    print(OmegaConf.load(min(tried, key=tried.__getitem__) / "config.yaml").optimizer.lr)
