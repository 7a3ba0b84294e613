"""The losses that autoencoders are trained on."""

from diffusion_lab.first_stage.reconstruction.reconstruction_loss import ReconstructionLoss
