from diffusion_lab.first_stage.base import FirstStage, Pixels

__all__ = ["FirstStage", "Pixels"]
