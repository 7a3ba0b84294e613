"""The runs' own sample grids, side by side: every cell is of one class and one noise in all."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab.analysis.comparison.groups import Group, Member
from diffusion_lab.common.images import ENLARGED, GAP
from diffusion_lab.runs.folder import SAMPLES
from diffusion_lab.training.callbacks import Grid, configured

ALL_BYTES = 5_000_000  # of the pictures together, as they are in the page
ROWS, OF_EACH = 10, 2  # classes in a strip, and samples of each
QUALITY = 82  # of WebP, where PNG is too large
SMALLEST = 32  # pixels, of the longer side
WHITE = OPAQUE = 255


@dataclass(frozen=True)
class Samples:
    """A group's grid of one run, and two samples of each class in a line, as data URIs."""

    group: Group
    member: Member
    grid: str
    strip: str | None


def samples(groups: Sequence[Group]) -> list[Samples]:
    """A grid of each group that has one, all of one training seed where they share one."""
    seeds = [set(group.by_seed) for group in groups]
    counts = {seed: sum(seed in each for each in seeds) for seed in set().union(*seeds)}
    preferred = sorted(counts, key=lambda seed: (-counts[seed], seed))
    found = []
    for group in groups:
        seed = next(seed for seed in preferred if seed in group.by_seed)
        path = latest_grid(group.by_seed[seed].run.folder)
        if path is not None:
            found.append((group, group.by_seed[seed], path))
    share = ALL_BYTES // max(1, 2 * len(found))
    return [_samples(group, member, path, share) for group, member, path in found]


def grid_noise(member: Member) -> str | None:
    """What decides the noise of each place of a run's grid, as one word; None: it is not known.

    Besides seed and columns the sampler, which may draw more noise on its way, and the space that
    is diffused.
    """
    config = member.run.config
    settings = configured(config, Grid)
    if not settings:
        return None
    parts = [
        OmegaConf.select(config, key) for key in ("sampler", "first_stage", "data.source._target_")
    ]
    plain = [OmegaConf.to_container(p) if OmegaConf.is_config(p) else p for p in parts]
    return json.dumps([settings.seed, settings.columns, *plain], default=str, sort_keys=True)


def latest_grid(folder: Path) -> Path | None:
    """The picture of the last step."""
    steps = {
        int(number): path
        for path in (folder / SAMPLES).glob("step_*.png")
        if (number := path.stem.removeprefix("step_")).isdecimal()
    }
    return steps[max(steps)] if steps else None


def _samples(group: Group, member: Member, path: Path, share: int) -> Samples:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
    pixels = pixels[::ENLARGED, ::ENLARGED]
    settings = configured(member.run.config, Grid)
    cells = cells_of(pixels, settings.columns) if settings else None
    strip = None
    if cells is not None:
        line = [cell for row in cells[:ROWS] for cell in row[:OF_EACH]]
        strip = data_uri(side_by_side(line), share)
    return Samples(group, member, data_uri(pixels, share), strip)


def cells_of(pixels: np.ndarray, columns: int) -> list[list[np.ndarray]] | None:
    """The square images (h, w) or (h, w, 3) of a grid, by row; None if it is no such grid."""
    height, width = pixels.shape[:2]
    pitch, rest = divmod(width - GAP, columns)
    if rest or pitch <= GAP or (height - GAP) % pitch:
        return None
    lines = [pixels[:, x : x + GAP] for x in range(0, width, pitch)]
    lines += [pixels[y : y + GAP] for y in range(0, height, pitch)]
    if any((line != WHITE).any() for line in lines):
        return None
    return [
        [pixels[y : y + pitch - GAP, x : x + pitch - GAP] for x in range(GAP, width, pitch)]
        for y in range(GAP, height, pitch)
    ]


def side_by_side(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Images in one line (h, w, C + 1), nothing between, and more of it after each `OF_EACH`."""
    cells = [cell if cell.ndim == 3 else cell[..., None] for cell in cells]  # (h, w, C)
    solid = [np.concatenate([c, np.full_like(c[..., :1], OPAQUE)], axis=2) for c in cells]
    gap = np.zeros_like(solid[0][:, :GAP])
    parts = []
    for place, cell in enumerate(solid):
        if place:
            parts += [gap, gap] if place % OF_EACH == 0 else [gap]
        parts.append(cell)
    return np.concatenate(parts, axis=1)


def data_uri(pixels: np.ndarray, most: int) -> str:
    """A picture of at most so many characters: as it is, else compressed, else made smaller."""
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
