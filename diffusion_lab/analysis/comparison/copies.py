"""What `memorization` found of the runs, as far as it may be compared."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.metrics.neighbours import COPIES, PIXEL_COPIES
from diffusion_lab.metrics.protocol import FINGERPRINT, Protocol
from diffusion_lab.runs.results import Sampling


def copy_ratios(
    runs: Sequence[Run], sampling: Sampling
) -> tuple[dict[Path, dict[str, float]], list[str]]:
    """The ratios of runs, by folder, and sentences on what is left out.

    Only of their present weights, sampled so; none if they were not all counted alike.
    """
    found: dict[Path, dict[str, float]] = {}
    protocols, said = [], []
    for run in runs:
        report = report_of(run)
        if report is None:
            continue
        if reason := unfit(run, report, sampling):
            said.append(f"Copies of {run.folder} are left out: {reason}")
            continue
        ratios = (space["copy_ratio"] for space in report["neighbours"].values())
        found[run.folder] = dict(zip((COPIES.name, PIXEL_COPIES.name), ratios, strict=True))
        protocols.append(report["protocol"])
    if unequal := differing(protocols):
        words = "; ".join(f"{key} is {' or '.join(values)}" for key, values in unequal.items())
        said.append(
            f"Copies are left out: they were not counted alike in all runs ({words}); run "
            "`diffusion-lab memorization` on all of them with one choice"
        )
        return {}, said
    return found, said


def report_of(run: Run) -> dict | None:
    """What `memorization` wrote in a run; None: nothing that can be read."""
    path = run.folder / "memorization" / "report.json"
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "neighbours" in report else None


def unfit(run: Run, report: dict, sampling: Sampling) -> str | None:
    """Why a report cannot be compared, if so."""
    again = f"measure them again by `diffusion-lab memorization run={run.folder}`"
    if report["sampling"] != sampling:
        return f"its report is of another sampling than is compared; {again}, sampled like the rest"
    if run.weights.file_stamp is None:
        return "its checkpoints are gone, and with them what tells whether its report is of them"
    if not run.weights.match(report):
        return f"its report is of other weights than it has now; {again}"
    return None


def differing(protocols: Sequence[Protocol]) -> dict[str, list[str]]:
    """What is not the same in all of them, and its values in words."""
    keys = dict.fromkeys(key for each in protocols for key in each if key != FINGERPRINT)
    values = {key: list(dict.fromkeys(str(each.get(key)) for each in protocols)) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}
