"""Runs `diffusion-lab` with less patience for ranks that do not answer, under torchrun."""

from datetime import timedelta

from diffusion_lab.cli import main
from diffusion_lab.compute import launch

launch.PATIENCE = timedelta(seconds=5)
main()
