"""A strip of pictures from noise to a sample, and of what the network expects on the way.

    python experiments/write_up/strip.py RUN [--steps 50] [--columns 8] [--output FILE]

RUN is a run of a class-conditional model of images. Each row is a class: its state at equal numbers
of DDIM's steps, and below it the network's estimate of the image at the same states.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab import runs
from diffusion_lab.common.images import save_png
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.sampler import Ancestral
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid


@torch.inference_mode()
def strip(run: Path, steps: int, columns: int, classes: int) -> Tensor:
    """Images (2 x classes x columns, C, H, W), uint8, in reading order."""
    datamodule, model = runs.load(run)
    labels = torch.arange(classes)
    noise = SampleNoise(0, range(classes))
    sampler = Ancestral(steps, UniformGrid(), eta=0.0)
    levels = sampler.time_grid(model.schedule, steps)
    denoise = Guidance().bind(model.denoiser.eval(), labels)
    x = levels[0].sigma.float() * noise(model.denoiser.image_shape)
    states = [x, *sampler.walk(denoise, x, levels, model.schedule, noise.randn_like)]
    shown = torch.linspace(0, steps, columns).round().long().tolist()
    rows = []
    for place in shown:
        last = place == steps
        estimate = states[place] if last else denoise(states[place], levels[place]).x0
        rows.append(torch.stack([states[place], estimate], 1))  # (classes, 2, C, H, W)
    latents = torch.stack(rows, 2).flatten(0, 2)  # class by class, state above estimate
    return datamodule.to_native(model.first_stage.decode(latents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--output", type=Path, help="default: strip.png in the run's folder")
    chosen = parser.parse_args()
    images = strip(chosen.run, chosen.steps, chosen.columns, chosen.classes)
    datamodule, _ = runs.load(chosen.run)
    path = chosen.output or chosen.run / "strip.png"
    save_png(datamodule.source.picture(images, chosen.columns), path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
