"""Writes scikit-learn's 1,797 handwritten digits (8 x 8, grey) as pictures of 28 x 28.

    pip install scikit-learn
    python experiments/fine_tuning/digits.py data/digits

There is a folder for each digit, as `data=image_folder` reads it.
"""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

SIDE, WHITE = 28, 16  # pixels, and the brightest value of the digits


def main() -> None:
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = Path(sys.argv[1]) / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels * 255 / WHITE).astype("uint8"))
        picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")


if __name__ == "__main__":
    main()
