"""Puts samples of several runs below one another, drawn from the same noise and classes.

    python experiments/side_by_side.py PICTURE RUN RUN ...

A row has the first two samples of each class in a run's last grid, in the order of the runs. Grids
are drawn with one seed by default, so a column of the picture has one noise. In place of a run a
picture of `diffusion-lab sample` may stand, whose rows are shown as they are, if all are such.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_lab.common.images import ENLARGED, GAP
from diffusion_lab.report.page import OF_EACH, WHITE, cells_of, latest_grid


def rows_of(source: Path, columns: int) -> np.ndarray:
    """The samples of a run's last grid side by side, or the rows of a picture, (h, w[, 3])."""
    grid = source if source.is_file() else latest_grid(source)
    if grid is None:
        raise SystemExit(f"{source} has no grid of samples")
    with Image.open(grid) as picture:
        pixels = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
    pixels = pixels[::ENLARGED, ::ENLARGED]
    if source.is_file():
        return pixels
    edge = ((GAP // 2,) * 2,) * 2 + ((0, 0),) * (pixels.ndim - 2)
    rows = cells_of(pixels, columns)[:, :OF_EACH]
    return np.hstack([np.pad(cell, edge, constant_values=WHITE) for row in rows for cell in row])


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("sources", type=Path, nargs="+", help="runs, or pictures of sample")
    parser.add_argument("--columns", type=int, default=10, help="samples in a row of a run's grid")
    given = parser.parse_args()
    rows = np.vstack([rows_of(source, given.columns) for source in given.sources])
    large = rows.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
    Image.fromarray(large).save(given.picture, optimize=True)


if __name__ == "__main__":
    main()
