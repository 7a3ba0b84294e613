"""A tiny autoencoder of diffusers with the shapes of Stable Diffusion's, untrained."""

from pathlib import Path

import pytest
import torch


def save_vae(folder: Path) -> Path:
    """Writes the autoencoder to a folder: 4 channels, and sides an eighth of the image's."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8] * 4,
            norm_num_groups=4,
        ).save_pretrained(folder)
    return folder
