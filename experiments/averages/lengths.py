"""FID by the length of the average, made after training or kept during it.

    python experiments/averages/lengths.py SWEEPS

SWEEPS has a folder for each seed, named seed-<seed>, as `diffusion-lab sample-sweep average=...`
writes it. Collects them in results.csv beside this file, and prints the table of README.md. Without
SWEEPS it prints the table of the results that are there.
"""

import csv
import statistics
import sys
from pathlib import Path

from scipy import stats

from diffusion_lab.common.formats import csv_text, markdown_table

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ("average", "seed", "fid", "kid", "fid_real")
DEFAULT = "null"  # the average that samples come from if none is chosen
Row = dict[str, str]


def collect(sweeps: Path) -> list[Row]:
    """The rows of all sweeps: an average of a seed each."""
    rows = []
    for path in sorted(sweeps.glob("seed-*/results.csv")):
        seed = path.parent.name.removeprefix("seed-")
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                named = row | {"seed": seed}
                rows.append({name: named[name] for name in COLUMNS})
    return rows


def interval(values: list[float]) -> str:
    """The mean of some seeds with half of its 95 % interval (Student's t), if there are several."""
    mean = f"{statistics.mean(values):+.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {stats.t.ppf(0.975, len(values) - 1) * stats.sem(values):.1f}"


def table(rows: list[Row]) -> str:
    """The Markdown table: FID of each average, and its paired difference to the default one."""
    fids: dict[str, dict[str, float]] = {}
    for row in rows:
        fids.setdefault(row["average"], {})[row["seed"]] = float(row["fid"])
    lines = []
    for average, by_seed in sorted(fids.items(), key=lambda pair: -len(pair[1])):
        gaps = [fid - fids[DEFAULT][seed] for seed, fid in by_seed.items()]
        each = ", ".join(f"{gap:+.1f}" for gap in gaps)
        gap = f"{interval(gaps)} ({each})"
        mean = f"{statistics.mean(by_seed.values()):.1f}"
        lines.append([average, mean, "" if average == DEFAULT else gap])
    return markdown_table(["average", "FID", "against the default (each seed)"], lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        found = collect(Path(sys.argv[1]))
        RESULTS.write_text(csv_text(COLUMNS, [row.values() for row in found]))
    with RESULTS.open(newline="") as file:
        print(table(list(csv.DictReader(file))))
