"""How far a reconstruction is from its image: what autoencoders are trained on."""

from diffusion_lab.first_stage.reconstruction.reconstruction_loss import ReconstructionLoss
