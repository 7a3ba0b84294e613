"""First stages: the spaces that are diffused, pixels or the latents of a trained autoencoder."""

from diffusion_lab.first_stage.base import FirstStage, Pixels
from diffusion_lab.first_stage.trained import HubVAE, TrainedKL, TrainedVQ
