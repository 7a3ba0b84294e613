"""A run's rows as its loggers should have them: each name once a step."""

from pathlib import Path

from helpers.tiny_runs import rows

MEASURED = ("seconds", "train/images_per_second")  # measured times, which are never equal


def by_step(folder: Path) -> dict[int, dict[str, float]]:
    """The values of metrics.jsonl by step, those that are measured left out."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows(folder):
        step = row.pop("step")
        steps[step] = steps.get(step, {}) | row
    return {step: without_times(row) for step, row in steps.items()}


def without_times(row: dict[str, float]) -> dict[str, float]:
    """The values of a row that two equal runs share."""
    return {name: value for name, value in row.items() if name not in MEASURED}
