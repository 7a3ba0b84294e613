"""Puts the last samples of several runs below one another, drawn from the same noise and classes.

    python experiments/side_by_side.py PICTURE RUN RUN ...

A row has the first two samples of each class in a run's last grid, in the order of the runs. Grids
are drawn with one seed by default, so a column of the picture has one noise.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_lab.analysis.comparison.pictures import OF_EACH, WHITE, cells_of, latest_grid
from diffusion_lab.common.images import ENLARGED, GAP


def strip(run: Path, columns: int) -> np.ndarray:
    """The first samples of each row of the run's last grid, side by side, (h, w)."""
    with Image.open(latest_grid(run)) as picture:
        pixels = np.asarray(picture.convert("L"))[::ENLARGED, ::ENLARGED]
    rows = cells_of(pixels, columns)[:, :OF_EACH]
    line = [np.pad(cell, GAP // 2, constant_values=WHITE) for row in rows for cell in row]
    return np.hstack(line)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--columns", type=int, default=10, help="samples in a row of a grid")
    given = parser.parse_args()
    rows = np.vstack([strip(run, given.columns) for run in given.runs])
    large = rows.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
    Image.fromarray(large).save(given.picture, optimize=True)


if __name__ == "__main__":
    main()
