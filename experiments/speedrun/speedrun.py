"""The speedrun: which recipe draws the best samples after five and a quarter minutes on two cores?

    python experiments/speedrun/speedrun.py NAME "what changed" [overrides ...]
        [--against NAME] [--seeds 0 1 2] [--time DD:HH:MM:SS | --images N] [--jobs 1]
        [--before "OVERRIDES"] [--out FOLDER] [--table FILE]

trains `experiment=quickstart` with the overrides once for each seed, --jobs runs at a time, and
measures each run's samples against validation images. The trial becomes a row of the table, with
its gap to the trial that --against names, else to the record so far. A finished run is not
repeated and a stopped one is resumed, so the same command goes on where it was.

On a machine that other work shares, equal time is better counted in images: --images, by the times
of steps that experiments/benchmarks/steps.py measures in turns. With --before, each seed first
trains with those overrides, such as on smaller images, and the trial starts from the weights.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from scipy import stats

HERE = Path(__file__).parent
SEEDS = 3  # of a record
COLUMNS = [
    *("name", "change", "overrides", "seeds", "fid", "fid_mean", "kid_mean", "images_mean"),
    *("against", "gap", "gap_95", "record"),
    *("time", "threads", "device", "commit", "date"),
]
Row = dict[str, str]


def train(folder: Path, seed: int, chosen: argparse.Namespace, overrides: list[str]) -> dict:
    """Trains or resumes a run of the quickstart, if it is not finished; returns its summary.

    A folder with a run of other settings is refused, as in any study.
    """
    arguments = ["experiment=quickstart", f"seed={seed}", f"run_dir={folder}", "logger=none"]
    arguments += ["metrics.reference=validation", "study_name=speedrun", *overrides]
    one_thread = {"OMP_NUM_THREADS": "1"} if chosen.jobs > 1 else {}
    command = [sys.executable, "-m", "diffusion_lab", "train", *arguments]
    subprocess.run(command, check=True, env=os.environ | one_thread)
    return json.loads((folder / "summary.json").read_text())


def trial(seed: int, chosen: argparse.Namespace) -> dict:
    """The summary of the trial's run of a seed, behind the training before it, if there is one."""
    overrides = [f"trainer.max_time={chosen.time}"]
    if chosen.images:
        overrides = ["budget=images", f"budget.images={chosen.images}"]
    if chosen.before:
        before = chosen.out / chosen.name / f"before-seed-{seed}"
        train(before, seed, chosen, [*shlex.split(chosen.before), "callbacks.evaluation=null"])
        overrides += [f"init_from={before}"]
    folder = chosen.out / chosen.name / f"seed-{seed}"
    return train(folder, seed, chosen, [*overrides, *chosen.overrides])


def metric(summary: dict, name: str) -> float:
    """The value of a metric of samples, whatever it was measured against."""
    return next(v for key, v in summary["metrics"].items() if key.split("/")[0] == name)


def row_of(name: str, change: str, overrides: list[str], seeds: list[int], runs: list[dict]) -> Row:
    """The row of a trial, from the summaries of its runs; not yet compared with others."""
    fids = [metric(run, "fid") for run in runs]
    return {
        "name": name,
        "change": change,
        "overrides": " ".join(overrides),
        "seeds": " ".join(map(str, seeds)),
        "fid": " ".join(f"{fid:.1f}" for fid in fids),
        "fid_mean": f"{statistics.mean(fids):.1f}",
        "kid_mean": f"{statistics.mean(metric(run, 'kid') for run in runs):.4f}",
        "images_mean": f"{statistics.mean(run['images_seen'] for run in runs):.0f}",
        "threads": str(runs[0]["threads"]),
        "device": runs[0]["device"],
        "commit": runs[0]["git_commit"] or "",
    }


def gap(own: Row, other: Row) -> tuple[float, float | None]:
    """The mean difference of FID over the seeds of both trials, and half its 95 % interval.

    The interval is that of a paired t-test, None for one seed. A seed must be common.
    """
    mine, theirs = (
        dict(zip(row["seeds"].split(), row["fid"].split(), strict=True)) for row in (own, other)
    )
    seeds = sorted(mine.keys() & theirs.keys())
    differences = [float(mine[seed]) - float(theirs[seed]) for seed in seeds]
    half = None
    if len(differences) > 1:
        quantile = float(stats.t.ppf(0.975, len(differences) - 1))
        half = quantile * float(stats.sem(differences))
    return statistics.mean(differences), half


def best_record(rows: list[Row]) -> Row | None:
    """The record of the lowest FID; None if there is no record."""
    records = [row for row in rows if row["record"]]
    return min(records, key=lambda row: float(row["fid_mean"]), default=None)


def opponent(rows: list[Row], against: str | None, seeds: Iterable[str]) -> Row | None:
    """The trial `against`, and for None the best record, if there is one.

    Raises SystemExit if the table has no trial `against`, or if none of `seeds` is among its seeds.
    """
    if against is None:
        found = best_record(rows)
    elif not (found := next((row for row in rows if row["name"] == against), None)):
        raise SystemExit(f"--against {against}: the table has no such trial")
    if found and not {*found["seeds"].split()} & {*seeds}:
        raise SystemExit(
            f"{found['name']}, which this trial is compared with, has seeds {found['seeds']}; "
            "give --seeds one of them, or choose another trial by --against"
        )
    return found


def added(rows: list[Row], row: Row, against: str | None) -> list[Row]:
    """The rows of a table with a trial at its end, compared and marked if it is a record.

    A record has three seeds and a lower mean FID than every record before it. Raises SystemExit if
    there is no trial `against`, or none with a common seed.
    """
    rows = [each for each in rows if each["name"] != row["name"]]
    seeds = row["seeds"].split()
    best, other = best_record(rows), opponent(rows, against, seeds)
    complete = len(seeds) >= SEEDS
    better = best is None or float(row["fid_mean"]) < float(best["fid_mean"])
    row = row | {"record": "yes" if complete and better else ""}
    if other:
        mean, half = gap(row, other)
        row |= {"against": other["name"], "gap": f"{mean:.1f}"}
        row |= {"gap_95": "" if half is None else f"{half:.1f}"}
    return [*rows, row]


def read(path: Path) -> list[Row]:
    """The rows of a table, oldest first."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="a short name, also of the folder of its runs")
    parser.add_argument("change", help="what is different, in a few words")
    parser.add_argument("overrides", nargs="*", help="overrides of experiment=quickstart")
    parser.add_argument("--against", help="trial to compare with; default: the record so far")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--time", default="00:00:05:15", help="of training, DD:HH:MM:SS")
    parser.add_argument("--images", type=int, help="of training, in place of the time")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread")
    parser.add_argument("--before", help="overrides of a training before the trial's, in quotes")
    parser.add_argument("--out", type=Path, default=Path("outputs/speedrun"))
    parser.add_argument("--table", type=Path, default=HERE / "trials.csv")
    chosen = parser.parse_args()
    others = [row for row in read(chosen.table) if row["name"] != chosen.name]
    opponent(others, chosen.against, map(str, chosen.seeds))  # raises before anything is trained

    with ThreadPoolExecutor(chosen.jobs) as workers:
        runs = list(workers.map(lambda seed: trial(seed, chosen), chosen.seeds))
    overrides = [f"--before {chosen.before!r}"] if chosen.before else []
    overrides += chosen.overrides
    row = row_of(chosen.name, chosen.change, overrides, chosen.seeds, runs)
    time = f"{chosen.images} images" if chosen.images else chosen.time
    row |= {"time": time, "date": date.today().isoformat()}
    rows = added(read(chosen.table), row, chosen.against)
    with chosen.table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(f"{key:12} {value}" for key, value in rows[-1].items() if value))


if __name__ == "__main__":
    main()
