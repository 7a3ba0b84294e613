"""The file `first_stage.safetensors`: a trained autoencoder and all that is needed to use it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from diffusion_lab.common.files import write_atomically
from diffusion_lab.first_stage.autoencoder import (
    Autoencoder,
    FSQAutoencoder,
    KLAutoencoder,
    VQAutoencoder,
)

FIRST_STAGE_FILE = "first_stage.safetensors"  # in the folder of a run
KINDS: dict[str, type[Autoencoder]] = {
    each.kind: each for each in (KLAutoencoder, VQAutoencoder, FSQAutoencoder)
}

OF_OTHER_CONTENT = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class AutoencoderFacts:
    """Everything about a trained autoencoder that its weights do not say."""

    kind: str
    settings: dict[str, Any]  # constructor arguments
    image_shape: list[int]
    latent_mean: list[float]  # by channel, over the training images
    latent_std: list[float]
    data: str  # `images_fingerprint` of the training data
    metrics: dict[str, float]  # of reconstructed test images


def save_autoencoder(autoencoder: Autoencoder, facts: AutoencoderFacts, path: Path) -> None:
    """Writes weights and facts into one file, atomically."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in autoencoder.state_dict().items()}
    write_atomically(path, safetensors.torch.save(weights, {"facts": json.dumps(asdict(facts))}))


def load_autoencoder(path: Path) -> tuple[Autoencoder, AutoencoderFacts, bytes]:
    """Reads a frozen autoencoder, its facts, and the file's content; raises ValueError."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; train an autoencoder with `diffusion-lab train-autoencoder`, "
            "which writes this file at the end, and give its run folder"
        )
    content = path.read_bytes()
    try:
        with safe_open(path, "pt") as file:
            facts = AutoencoderFacts(**json.loads(file.metadata()["facts"]))
        kind = KINDS[facts.kind]
        channels, height, width = facts.image_shape
        autoencoder = kind((channels, height, width), **facts.settings)
        autoencoder.load_state_dict(safetensors.torch.load(content))
        torch.tensor([facts.latent_mean, facts.latent_std]).view(2, autoencoder.latent_shape[0])
        facts.metrics.items()
    except (SafetensorError, *OF_OTHER_CONTENT) as error:
        raise ValueError(
            f"{path} is damaged, or was not written by this program; train it again with "
            "`diffusion-lab train-autoencoder`"
        ) from error
    return autoencoder.requires_grad_(False).eval(), facts, content
