"""The command `status`: which runs wait, train, have ended or failed, here or on SLURM."""

from diffusion_lab.analysis.status.command import status
