"""Puts what was measured of several runs in several ways into one CSV file, for tables over seeds.

    python experiments/sampled.py FILE RUN RUN ...

It has all rows of RUN/sweeps/SWEEP/results.csv, rows of the sweep "trained" for the numbers of
steps that the end of training measured, and rows of "evaluated" for later evaluations, with the
features of their FID. In front are the run's name without its seed and without
the keys and values that all names begin with, the class of the network, and the training seed.
There is a column for each key that any sweep varied; `seed` of a sweep is called sampling_seed.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from diffusion_lab.common.files import read_json, write_atomically
from diffusion_lab.common.formats import csv_text
from diffusion_lab.metrics.quantity import REAL, quantity_of


def rows_of(run: Path) -> list[dict[str, object]]:
    """All rows of a run."""
    cfg, summary = OmegaConf.load(run / "config.yaml"), read_json(run / "summary.json")
    own = {
        "run": run.name.removesuffix(f"_seed-{cfg.seed}"),
        "network": cfg.backbone._target_.rpartition(".")[2],
        "seed": cfg.seed,
    }
    rows: list[dict[str, object]] = []
    for path in sorted(run.glob("sweeps/*/results.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if "seed" in row:  # of the samples
                    row = {"sampling_seed": row.pop("seed"), **row}
                rows.append(own | {"sweep": path.parent.name} | row)
    for measured in (summary, *summary.get("at_other_steps", ())):
        way = measured.get("sampling") or {}  # none of a run that was not measured
        if steps := way.get("sampler", {}).get("steps"):
            rows.append(own | {"sweep": "trained", "steps": steps} | known(measured["metrics"]))
    for measured in map(read_json, sorted(run.glob("evaluations/*.json"))):
        way, features = measured["sampling"], measured["protocol"]["extractor"]
        found = {"sweep": "evaluated", "steps": way["sampler"].get("steps"), "features": features}
        rows.append(own | found | {"sampling_seed": way["seed"]} | known(measured["metrics"]))
    return rows


def known(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of known kinds by their kind, such as fid."""
    kinds = {name.partition("/")[0]: value for name, value in metrics.items()}
    return {kind: of for kind, of in kinds.items() if quantity_of(kind.removesuffix(REAL))}


def shared_part(names: Sequence[str]) -> str:
    """The keys and values that all names of runs begin with; none if the names are equal."""
    first, last = min(names), max(names)
    equal = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first.rfind("-", 0, equal) + 1]


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    if missing := [str(run) for run in given.runs if not (run / "config.yaml").is_file()]:
        parser.error(f"{missing[0]} is no run: it has no config.yaml")
    rows = [row for run in given.runs for row in rows_of(run)]
    shared = shared_part([str(row["run"]) for row in rows])
    for row in rows:
        row["run"] = str(row["run"]).removeprefix(shared)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_atomically(given.file, csv_text(columns, [[row.get(c) for c in columns] for row in rows]))


if __name__ == "__main__":
    main()
