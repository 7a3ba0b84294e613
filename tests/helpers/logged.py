"""The names that loggers should have, as the page on W&B lists them, each once a step."""

from fnmatch import fnmatchcase
from pathlib import Path

from diffusion_lab.metrics.quantity import OF_SAMPLES
from diffusion_lab.runs.log_names import AXES, GRIDS, SAMPLES, on_dashboards
from helpers.tiny_runs import rows

KINDS = ("fid_std", *(q.name for q in OF_SAMPLES if q.name != "fid_class"))
SCALARS = (
    "train/*",
    "val/*",
    "test/*",
    *(f"levels/{part}/t*" for part in ("train", "val", "test")),
    *(f"latents/{part}/*" for part in ("val", "test")),
    *(f"modules/{each}/*" for each in ("weight_norm", "grad_norm", "update_norm")),
    "modules/activation_max/*",
    *(f"samples/{kind}/*" for kind in KINDS),
    *(f"real/{kind}/*" for kind in KINDS),
    "samples/fid_class*/*",
    "real/fid_class*/*",
    "reconstructions/fid*/*",
    "reconstructions/kid*/*",
)
SUMMARY = ("parameters", "training_seconds")  # keys of summary.json that W&B's summary has too


def is_known(name: str) -> bool:
    """Whether a dashboard may have this name, or W&B's summary."""
    patterns = (*AXES, *SCALARS, *SUMMARY, f"{GRIDS}/*", SAMPLES)
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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
