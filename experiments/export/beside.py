"""Draws samples of a run twice from the same noise: by this package, and by diffusers.

    python experiments/export/beside.py RUN EXPORT PICTURE [--steps 50] [--columns 10]

EXPORT is what `diffusion-lab export run=RUN format=diffusers output=EXPORT` wrote; its sample.py
draws. RUN is a model of pixels. In the picture each row of ours is above the same one of diffusers.
Prints the largest difference of their pixels in [-1, 1].
"""

import argparse
import runpy
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab import runs
from diffusion_lab.common.images import save_png, to_uint8
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.sampler import Ancestral
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid

ROWS = 2


@torch.inference_mode()
def beside(run: Path, export: Path, steps: int, columns: int) -> tuple[Tensor, float]:
    """The images (2 x ROWS x columns, C, H, W), uint8, in reading order, and the difference."""
    datamodule, model = runs.load(run)
    count = ROWS * columns
    noise = SampleNoise(0, range(count))
    labels = torch.arange(count) % columns
    sampler = Ancestral(steps, UniformGrid(sigma_min=0.0), eta=0.0)  # DDIM, Euler for a flow
    levels = sampler.time_grid(model.schedule, steps)
    denoise = Guidance().bind(model.denoiser.eval(), labels)
    start = noise(model.denoiser.image_shape)
    x = levels[0].sigma.float() * start
    *_, ours = sampler.walk(denoise, x, levels, model.schedule, noise.randn_like)
    theirs = runpy.run_path(str(export / "sample.py"))["sample"](start, labels, steps)
    both = torch.stack([each.unflatten(0, (ROWS, columns)) for each in (ours, theirs)], 1)
    images = datamodule.to_native(to_uint8(both.flatten(0, 2)))
    return images, float((ours - theirs).abs().max())


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--columns", type=int, default=10, help="samples in a row: one of a class")
    given = parser.parse_args()
    images, difference = beside(given.run, given.export, given.steps, given.columns)
    datamodule, _ = runs.load(given.run)
    save_png(datamodule.source.picture(images, given.columns), given.picture)
    print(f"Largest difference: {difference:.2g}; picture: {given.picture}")


if __name__ == "__main__":
    main()
