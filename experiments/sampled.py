"""Puts the results of several runs' sample-sweeps into one CSV file, for tables over seeds.

    python experiments/sampled.py FILE RUN RUN ...

It has all rows of RUN/sweeps/SWEEP/results.csv, with the network's class, the training seed, and
SWEEP in front, and a column for each key that any sweep varied.
"""

import argparse
import csv
from pathlib import Path

from omegaconf import OmegaConf

from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import csv_text


def rows_of(run: Path) -> list[dict[str, object]]:
    """The rows of all sweeps of a run; raises SystemExit if there are none."""
    cfg = OmegaConf.load(run / "config.yaml")
    own = {"network": cfg.backbone._target_.rpartition(".")[2], "seed": cfg.seed}
    rows: list[dict[str, object]] = []
    for path in sorted(run.glob("sweeps/*/results.csv")):
        with path.open(newline="") as file:
            rows += [own | {"sweep": path.parent.name} | row for row in csv.DictReader(file)]
    if not rows:
        raise SystemExit(f"{run} has no results of sample-sweep")
    return rows


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    rows = [row for run in given.runs for row in rows_of(run)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_atomically(given.file, csv_text(columns, [[row.get(c) for c in columns] for row in rows]))


if __name__ == "__main__":
    main()
