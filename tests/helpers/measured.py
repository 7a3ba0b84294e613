"""The denoising loss by which an objective's model is validated, at given noise and levels."""

from diffusion_lab.diffusion.estimate import NOTHING


def loss_at(objective, denoiser, x0, eps, level, given=NOTHING):
    """The loss (B,) of samples x0 (B, C, H, W) with noise eps at a level (B,)."""
    parts = objective.schedule, objective.prediction
    return objective.loss.measured(*parts, denoiser, x0, eps, level, given)
