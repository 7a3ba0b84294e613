"""Do more sampling steps draw better samples? The figures of four objectives, from their sweeps.

    python experiments/objectives/rise.py RUNS

RUNS is the folder of a study's runs, as in outputs/objectives/train. Collects their sweeps over 10
and 50 steps in results.csv beside this file, and prints the table of README.md. Without RUNS it
prints the table of the results that are there.
"""

import csv
import statistics
import sys
from pathlib import Path

from scipy import stats

from diffusion_lab.common.formats import csv_text, markdown_table

RESULTS = Path(__file__).parent / "results.csv"
FEW, MANY = 10, 50  # steps
COLUMNS = ("fid", "fid_real", "kid", "classifier_fid", "classifier_fid_real", "accuracy")
Row = dict[str, str]


def collect(runs: Path) -> list[Row]:
    """The rows of all sweeps: an objective, a seed and a number of steps each."""
    rows = []
    for path in sorted(runs.glob("*/sweeps/*/results.csv")):
        objective, _, seed = path.parents[2].name.rpartition("_seed-")
        if path.parent.name != "steps":  # on another grid
            objective += f", {path.parent.name}"
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                named = {"objective": objective, "seed": seed, "steps": row["steps"]}
                rows.append(named | {name: row[name] for name in COLUMNS})
    return rows


def rise(rows: list[Row], objective: str, metric: str) -> tuple[float, float, list[float]]:
    """The means at few and at many steps, and the difference of each seed."""
    values = {
        steps: {r["seed"]: float(r[metric]) for r in rows if (r["objective"], r["steps"]) == key}
        for steps in (FEW, MANY)
        for key in [(objective, str(steps))]
    }
    differences = [values[MANY][seed] - values[FEW][seed] for seed in values[FEW]]
    return *(statistics.mean(values[steps].values()) for steps in (FEW, MANY)), differences


def table(rows: list[Row]) -> str:
    """The Markdown table: the rise of both FIDs with its 95 % interval (Student's t)."""
    lines = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        line = [objective]
        for metric in ("fid", "classifier_fid"):
            few, many, differences = rise(rows, objective, metric)
            width = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
            each = ", ".join(f"{difference:+.1f}" for difference in differences)
            line += [f"{few:.1f}", f"{many:.1f}"]
            line += [f"{statistics.mean(differences):+.1f} ± {width:.1f} ({each})"]
        lines.append(line)
    head = ["objective", f"FID, {FEW} steps", f"{MANY} steps", "rise (each seed)"]
    head += [f"classifier FID, {FEW} steps", f"{MANY} steps", "rise (each seed)"]
    return markdown_table(head, lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        found = collect(Path(sys.argv[1]))
        RESULTS.write_text(csv_text(found[0], [row.values() for row in found]))
    with RESULTS.open(newline="") as file:
        print(table(list(csv.DictReader(file))))
