"""The runs' own sample grids, side by side, from the same classes and noise where possible."""

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from diffusion_lab.report.arms import Arm, runs_of
from diffusion_lab.report.records import AUTOENCODER, Run
from diffusion_lab.runs.files import SAMPLES

GAP, ENLARGED = 2, 2  # pixels between images of a grid, and how many times its PNG is enlarged
ALL_BYTES = 5_000_000  # limit of all pictures together, as data URIs in the page
ROWS, OF_EACH = 10, 2  # classes in a strip, and samples of each
QUALITY = 82  # quality of WebP, which replaces a PNG that is too large
SMALLEST = 32  # pixels of the longer side, below which no picture shrinks
WHITE = OPAQUE = 255


@dataclass(frozen=True)
class Samples:
    """The grid of one run of an arm, and a strip of two samples per class, as data URIs."""

    arm: Arm
    run: Run
    grid: str
    strip: str | None


def samples(arms: Sequence[Arm]) -> list[Samples]:
    """The grid of one run per arm that has one, of the same training seed where possible.

    A VAE has none: its grids are of reconstructions.
    """
    counts = Counter(run.seed for run in runs_of(arms))
    chosen = [min(arm.runs, key=lambda run: (-counts[run.seed], run.seed)) for arm in arms]
    found = [
        (arm, run, path)
        for arm, run in zip(arms, chosen, strict=True)
        if run.family != AUTOENCODER and (path := latest_grid(run.folder))
    ]
    share = ALL_BYTES // max(1, 2 * len(found))
    shown = []
    for arm, run, path in found:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
        pixels, strip = pixels[::ENLARGED, ::ENLARGED], None
        settings = grid_settings(run)
        if settings and (cells := cells_of(pixels, settings.columns)) is not None:
            line = [cell for row in cells[:ROWS] for cell in row[:OF_EACH]]
            strip = data_uri(side_by_side(line), share)
        shown.append(Samples(arm, run, data_uri(pixels, share), strip))
    return shown


def grid_settings(run: Run) -> DictConfig | None:
    """The settings of the callback that draws grids; None if the run draws none."""
    settings = filter(None, (run.config.get("callbacks") or {}).values())
    return next((each for each in settings if each._target_.endswith(".SampleGrid")), None)


def grid_noise(run: Run) -> str | None:
    """The settings that decide the noise at each place of a run's grid, as JSON text.

    Besides seed and columns these are the sampler, which may draw more noise, and the space that is
    diffused. None if the run draws no grids.
    """
    if (settings := grid_settings(run)) is None:
        return None
    parts = ("sampler", "first_stage", "data.source._target_")
    facts = [settings.seed, settings.columns, *(OmegaConf.select(run.config, p) for p in parts)]
    return json.dumps(facts, default=OmegaConf.to_container, sort_keys=True)


def latest_grid(folder: Path) -> Path | None:
    """The sample grid of the last step; None if there is none."""
    steps = {
        int(number): path
        for path in (folder / SAMPLES).glob("step_*.png")
        if (number := path.stem.removeprefix("step_")).isdecimal()
    }
    return steps[max(steps)] if steps else None


def cells_of(pixels: np.ndarray, columns: int) -> np.ndarray | None:
    """Splits a grid into its square images (rows, columns, h, w, ...); None if it is not a grid."""
    height, width, *channels = pixels.shape
    pitch, rest = divmod(width - GAP, columns)
    if rest or pitch <= GAP or (height - GAP) % pitch:
        return None
    cells = pixels[GAP:, GAP:].reshape(-1, pitch, columns, pitch, *channels).swapaxes(1, 2)
    lines = (pixels[:GAP], pixels[:, :GAP], cells[:, :, -GAP:], cells[:, :, :, -GAP:])
    if any((line != WHITE).any() for line in lines):
        return None
    return cells[:, :, :-GAP, :-GAP]


def side_by_side(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Joins images to a line (h, w, C + 1) with transparent gaps, wider after each `OF_EACH`."""
    parts = []
    for place, cell in enumerate(cells, 1):
        gap = 0 if place == len(cells) else GAP if place % OF_EACH else 2 * GAP
        solid = np.dstack([cell, np.full(cell.shape[:2], OPAQUE, np.uint8)])
        parts.append(np.pad(solid, ((0, 0), (0, gap), (0, 0))))
    return np.hstack(parts)


def data_uri(pixels: np.ndarray, most: int) -> str:
    """A picture as a data URI of `most` characters at most: PNG, else WebP, else made smaller."""
    picture = Image.fromarray(pixels)
    text = _encoded(picture, "png", optimize=True)
    picture = picture.convert("RGBA" if picture.mode in ("LA", "RGBA") else "RGB")
    while len(text) > most and max(picture.size) > SMALLEST:
        text = _encoded(picture, "webp", quality=QUALITY)
        picture = picture.resize(
            [max(1, side // 2) for side in picture.size], Image.Resampling.LANCZOS
        )
    return text


def _encoded(picture: Image.Image, kind: str, **settings: object) -> str:
    data = io.BytesIO()
    picture.save(data, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
