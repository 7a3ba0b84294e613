"""The records of a run that are published: small files, sealed by their checksums."""

import json
import shutil
from pathlib import Path

from diffusion_lab.common.files import read_json, read_rows, write_atomically
from diffusion_lab.report.records import median_rate, spike_in
from diffusion_lab.runs import published
from diffusion_lab.runs.current import CurrentWeights
from diffusion_lab.runs.files import CONFIG, METRICS, SUMMARY
from diffusion_lab.runs.results import EVALUATIONS

LARGEST = 200_000  # bytes of metrics.jsonl, above which rows of training losses are left out
REPORT = "memorization/report.json"
SWEEPS = "sweeps/*/results.csv"  # samplings in more ways
PLACE = ("step", "epoch", "images", "seconds")  # keys of a row that say where it belongs


def copy_records(run: Path, target: Path) -> None:
    """Copies the records of a run, or of a first stage, to the new folder `target`, and seals them.

    Evaluations of other weights than the run's current ones are not copied. A run that was
    published before keeps its seal.
    """
    if published.is_published(run):
        shutil.copytree(run, target, ignore=lambda folder, names: unsealed(run, folder, names))
        return
    weights = CurrentWeights(run)
    matching = [
        path.relative_to(run).as_posix()
        for path in sorted((run / EVALUATIONS).glob("*.json"))
        if weights.match(read_json(path))
    ]
    sweeps = [path.relative_to(run).as_posix() for path in sorted(run.glob(SWEEPS))]
    for name in (CONFIG, METRICS, SUMMARY, REPORT, *matching, *sweeps):
        if (run / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, target / name)
    published.seal(target, weights.sha256, thin(target / METRICS))


def unsealed(run: Path, folder: str, names: list[str]) -> set[str]:
    """The files in a folder of a published run that do not belong to its records, as a lock."""
    sealed = {published.PUBLISHED, *published.facts_of(run)[published.FILES]}
    paths = {name: Path(folder) / name for name in names}
    return {
        name
        for name, path in paths.items()
        if path.is_file() and path.relative_to(run).as_posix() not in sealed
    }


def thin(path: Path) -> dict[str, object] | None:
    """Leaves out rows of training losses, evenly, if a file is too large; says how many, or None.

    Rows with anything else stay, and so do the ones beside them, whose times plots use.
    """
    if not path.is_file() or path.stat().st_size <= LARGEST:
        return None
    rows = read_rows(path)
    lines = [json.dumps(row) + "\n" for row in rows]
    measured = {row.get("images") for row in rows if not of_training(row)}
    droppable = [
        place
        for place, row in enumerate(rows)
        if of_training(row) and row.get("images") not in measured
    ]
    losses = sum(len(lines[place]) for place in droppable)
    # a quarter at least, even if the other rows alone are too many
    room = max(LARGEST - (sum(map(len, lines)) - losses), LARGEST // 4)
    dropped = set(droppable) - set(droppable[:: max(1, -(-losses // room))])
    kept = [line for place, line in enumerate(lines) if place not in dropped]
    write_atomically(path, "".join(kept))
    left_out = {"rows": len(rows), "kept": len(kept)}
    return left_out | {published.RATE: median_rate(rows), published.SPIKE: spike_in(rows)}


def of_training(row: dict) -> bool:
    """Whether a row of metrics.jsonl has nothing but what training logs between evaluations."""
    return all(key in PLACE or key.startswith(("train/", "train_")) for key in row)
