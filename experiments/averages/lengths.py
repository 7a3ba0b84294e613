"""FID by the length of the average, made after training or kept during it.

    python experiments/averages/lengths.py SWEEPS

SWEEPS has a folder for each seed, named seed-<seed>, as `diffusion-lab sample-sweep average=...`
writes it. Collects them in results.csv beside this file, and prints the tables of README.md.
Without SWEEPS it prints those of the results that are there.
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
    """The mean of several seeds with half of its 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{statistics.mean(values):+.1f} ± {half:.1f}"


def tables(rows: list[Row]) -> str:
    """Two tables: FID and its paired difference to the default, of all seeds and of one."""
    fids: dict[str, dict[str, float]] = {}
    for row in rows:
        fids.setdefault(row["average"], {})[row["seed"]] = float(row["fid"])
    several = {average: by_seed for average, by_seed in fids.items() if len(by_seed) > 1}
    (seed,) = {seed for average in fids.keys() - several.keys() for seed in fids[average]}
    lines, alone = [], [[DEFAULT, f"{fids[DEFAULT][seed]:.1f}", ""]]
    for average, by_seed in fids.items():
        gaps = [fid - fids[DEFAULT][seed] for seed, fid in by_seed.items()]
        mean = f"{statistics.mean(by_seed.values()):.1f}"
        if average in several:
            each = f"{interval(gaps)} ({', '.join(f'{gap:+.1f}' for gap in gaps)})"
            lines.append([average, mean, "" if average == DEFAULT else each])
        else:
            alone.append([average, mean, f"{gaps[0]:+.1f}"])
    return "\n\n".join(
        [
            markdown_table(["average", "FID", "against the default (each seed)"], lines),
            markdown_table(["average", "FID", "against the default"], alone),
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        found = collect(Path(sys.argv[1]))
        RESULTS.write_text(csv_text(COLUMNS, [row.values() for row in found]))
    with RESULTS.open(newline="") as file:
        print(tables(list(csv.DictReader(file))))
