"""The classifiers that metrics were measured with, published in half precision."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from diffusion_lab.common import hashing
from diffusion_lab.common.files import write_atomically
from diffusion_lab.metrics.extractor.classifier import halved, name_of
from diffusion_lab.report.records import Run

OF_CLASSIFIER = name_of("")  # begins the names of classifiers in names of metrics


def publish_classifiers(runs: Sequence[Run], folder: Path) -> list[dict[str, object]]:
    """Writes the classifiers that metrics of `runs` name; returns their facts for the card.

    The file of one that is not where the runs' configurations say is null.
    """
    checksums = {path: hashing.of_file(path) for path in files_of(runs)}
    files = {name_of(checksum): path for path, checksum in checksums.items()}
    found: list[dict[str, object]] = []
    for name in sorted(named_by(runs)):
        facts: dict[str, object] = {"name": name, "file": None, "sha256": None}
        original = files.get(name)
        if original:
            facts["file"] = f"{name}.safetensors"
            content = halved(original)
            facts["sha256"] = hashing.of_bytes(content)
            write_atomically(folder / f"{name}.safetensors", content)
        found.append(facts | {"sha256_of_original": original and checksums[original]})
    return found


def named_by(runs: Iterable[Run]) -> set[str]:
    """The names of the classifiers in the full names of all metrics."""
    metrics = {name for run in runs for record in run.kept for name in record["metrics"]}
    parts = {part for name in metrics for part in name.split("/")[1:2]}
    return {part for part in parts if part.startswith(OF_CLASSIFIER)}


def files_of(runs: Iterable[Run]) -> set[Path]:
    """The existing files that the runs' configurations use as classifiers."""
    keys = ("metrics.classifier", "metrics.extractor.path")
    paths = {OmegaConf.select(run.config, key) for run in runs for key in keys}
    return {Path(path) for path in paths if path and Path(path).is_file()}
