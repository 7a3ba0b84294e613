"""SiT, as in willisma/SiT (arXiv:2401.08740): DiT's network as a velocity."""

from torch import Tensor

from diffusion_lab.common.ranges import settings
from diffusion_lab.importing.kind.dit import NETWORK, DiTFiles


@settings
class SiTFiles(DiTFiles):
    """SiT on the straight path, in the latents of Stable Diffusion's VAE.

    Its time runs from noise to data, and so does its velocity, data - noise; ours is noise - data.
    """

    recipe = (
        *NETWORK,
        "schedule=rectified",
        "objective=flow_matching",
        "objective/time_sampler=uniform",
        "denoiser.noise_label=data_time",
        "sampler=heun",
        "sampler.steps=125",
        "sampler.time_grid.sigma_min=0.0",  # to the end of the path, in even steps
    )
    unlearned = ()

    def used(self, outputs: Tensor, channels: int) -> Tensor:
        # the published networks have twice the outputs, and their code drops the second half
        return -outputs[:channels]
