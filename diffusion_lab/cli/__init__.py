"""The command line: `diffusion-lab <command> override=...`; each command is a Hydra application."""

from diffusion_lab.cli.program import command, main
