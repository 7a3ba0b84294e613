"""A run's rows as its loggers should have them: each name once a step."""

from pathlib import Path

from diffusion_lab.runs.log_names import on_dashboards
from helpers.tiny_runs import rows

MEASURED = ("seconds", "train/images_per_second")  # measured times, which are never equal


def by_step(folder: Path) -> dict[int, dict[str, float]]:
    """The values of metrics.jsonl by step and name on dashboards, without those measured."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows(folder):
        step = row.pop("step")
        shown = {on_dashboards(name): value for name, value in row.items()}
        steps[step] = steps.get(step, {}) | shown
    return {step: without_times(row) for step, row in steps.items()}


def without_times(row: dict[str, float]) -> dict[str, float]:
    """The values of a row that two equal runs share."""
    return {name: value for name, value in row.items() if name not in MEASURED}
