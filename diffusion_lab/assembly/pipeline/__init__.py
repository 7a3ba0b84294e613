"""From seeds and labels to uint8 images: whatever draws them, in batches, in grids, measured."""

from diffusion_lab.assembly.pipeline.diffusion import Pipeline, with_steps
from diffusion_lab.assembly.pipeline.generator import Generator, draw, draw_rows
