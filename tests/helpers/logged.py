"""The names that loggers should have, as the page on W&B lists them, each once a step."""

import io
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_lab.metrics.quantity import OF_SAMPLES
from diffusion_lab.runs.log_names import AXES, GRIDS, SAMPLES, on_dashboards
from helpers.tiny_runs import TINY, rows

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


# a row covers three steps; checkpoints are written inside a row and at a validation
ROWS = ["trainer.max_steps=8", "trainer.log_every_n_steps=3", "validate_every_n_steps=4"]
ROWS.append("callbacks.checkpoint.every_n_steps=2")
DRAWING = [*TINY, "callbacks.evaluation=null", "callbacks.sample_grid.every_n_steps=2"]
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


def once_each(values: Iterable[tuple[str, int, float]]) -> dict[int, dict[str, float]]:
    """The values that a logger has, given by name and step; asserts that none is there twice."""
    steps: dict[int, dict[str, float]] = {}
    for name, step, value in values:
        row = steps.setdefault(step, {})
        assert name not in row, f"{name} is there twice at step {step}"
        row[name] = value
    return steps


def assert_same_rows(found: dict[int, dict[str, float]], folder: Path) -> None:
    """Asserts that a logger has the names, steps and values of metrics.jsonl, as float32."""
    expected = by_step(folder)
    assert found.keys() == expected.keys()
    for step, row in found.items():
        own = {name: value for name, value in row.items() if not name.startswith("summary/")}
        assert [name for name in own if not is_known(name)] == []
        assert without_times(own) == pytest.approx(expected[step], rel=1e-6)
        assert own["seconds"] > 0


def assert_same_picture(content: bytes | Path, path: Path) -> None:
    given = io.BytesIO(content) if isinstance(content, bytes) else content
    with Image.open(given) as ours, Image.open(path) as kept:
        assert (np.asarray(ours.convert("RGB")) == np.asarray(kept.convert("RGB"))).all()
