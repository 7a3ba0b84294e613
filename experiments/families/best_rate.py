"""Prints the learning rate of the run with the lowest FID of its evaluation.

python experiments/families/best_rate.py RUN RUN ...
"""

import math
import sys
from pathlib import Path

from omegaconf import OmegaConf

from diffusion_lab.common.files import read_json


def fid_of(run: Path) -> float:
    """The FID of a run's only evaluation; infinite without one."""
    records = [read_json(path)["metrics"] for path in (run / "evaluations").glob("*.json")]
    values = [v for record in records for name, v in record.items() if name.startswith("fid/")]
    return min(values, default=math.inf)


if __name__ == "__main__":
    tried = {run: fid_of(run) for run in map(Path, sys.argv[1:])}
    for run, fid in tried.items():
        print(f"{run}: FID {fid:.1f}", file=sys.stderr)
    best = min(tried, key=tried.__getitem__)
    if math.isinf(tried[best]):
        raise SystemExit("no run could be evaluated")
    print(OmegaConf.load(best / "config.yaml").optimizer.lr)
