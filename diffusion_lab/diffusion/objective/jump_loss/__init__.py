"""Losses of models that draw a sample in one to four network calls."""

from diffusion_lab.diffusion.objective.jump_loss.base import JumpLoss
from diffusion_lab.diffusion.objective.jump_loss.consistency import Consistency
from diffusion_lab.diffusion.objective.jump_loss.distillation import Distillation
from diffusion_lab.diffusion.objective.jump_loss.mean_flow import MeanFlow
from diffusion_lab.diffusion.objective.jump_loss.shortcut import Shortcut
