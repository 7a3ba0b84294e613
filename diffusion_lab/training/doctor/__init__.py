"""A look at a training run before it is made: what is wrong, and what could be better."""

from diffusion_lab.training.doctor.diagnosis import diagnose
from diffusion_lab.training.doctor.report import show
