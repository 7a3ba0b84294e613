"""Published runs: the records of a run without its weights, which published.json stands for."""

from pathlib import Path
from typing import Any

from diffusion_lab.common.files import read_json, write_json

PUBLISHED = "published.json"
WEIGHTS, THINNED = "checkpoint", "thinned"  # its keys
CARD, WRITER = "card.json", "diffusion-lab publish"  # has the facts of a published folder
# of THINNED, before rows were left out: the median, and how far gradients rose above their median
RATE, SPIKE = "images_per_second", "gradient_spike"


def is_published(folder: str | Path) -> bool:
    """Whether a run folder was written by `diffusion-lab publish`."""
    return (Path(folder) / PUBLISHED).is_file()


def facts_of(folder: str | Path) -> dict[str, Any]:
    """The content of published.json; an empty dictionary if it is missing or damaged."""
    return read_json(Path(folder) / PUBLISHED)


def mark(folder: Path, weights: str | None, thinned: dict[str, Any] | None) -> None:
    """Writes published.json: the sha256 of the file with the weights, or None if that is gone.

    `thinned` says how many rows of metrics.jsonl there were, if some were left out.
    """
    write_json(folder / PUBLISHED, {WEIGHTS: weights, THINNED: thinned})


def has_card(folder: Path) -> bool:
    """Whether a folder is the whole folder that `publish` wrote."""
    written_by = read_json(folder / CARD).get("written_by")
    return isinstance(written_by, dict) and written_by.get("command") == WRITER
