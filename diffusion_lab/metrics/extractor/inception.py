"""The Inception network of published FIDs (arXiv:1706.08500), in torch-fidelity's port."""

import pickle
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.common import hashing
from diffusion_lab.common.messages import say
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable, FeatureExtractor

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
PUBLISHED_SHA256 = "6726825d"  # the beginning of that file's checksum
HOW_TO_GET = (
    f"download {URL} and set weights_path to it, "
    "or use metrics=efficientnet_lite0, which needs no download"
)
MAP_CHANNELS = 7
TIMEOUT = 10  # seconds without an answer


class Inception(FeatureExtractor):
    """FID's own 2048 features; the weights are downloaded once, or read from `weights_path`.

    The map is sFID's (arXiv:2103.03841) in the order of ADM's statistics: the first 7 channels of
    TensorFlow's mixed_6/conv, which the port calls Mixed_6d.branch1x1.

    The checksum of the file at `weights_path` must begin with `sha256`. Features from other weights
    than the published ones have the checksum in their name.
    """

    name = "inception"
    dim = 2048
    spatial_dim = 17 * 17 * MAP_CHANNELS
    preprocessing = "TensorFlow 1 bilinear 299x299, (x - 128) / 128"

    def __init__(self, weights_path: str | None = None, sha256: str | None = None):
        self.weights_path = weights_path
        self.sha256 = sha256

    def logits(self, features: Tensor) -> Tensor:
        """The Inception Score's logits, float32: of 1008 ImageNet classes, without the bias."""
        weight = self.network.network.fc.weight
        with self.in_float32():
            return features.to(weight) @ weight.T

    def build(self) -> tuple[nn.Module, str]:
        if self.weights_path is None:
            path, expected = download(), PUBLISHED_SHA256
        else:
            path, expected = Path(self.weights_path), str(self.sha256 or "").lower()
        if not path.is_file():
            raise ExtractorUnavailable(f"weights_path={path} does not exist; {HOW_TO_GET}")
        checksum = hashing.of_file(path)
        if not checksum.startswith(expected):
            raise ExtractorUnavailable(
                f"the sha256 of {path} is {checksum}, not {expected}; delete it, then {HOW_TO_GET}"
            )
        if not checksum.startswith(PUBLISHED_SHA256):
            self.name = f"inception-{checksum[:8]}"
        return PooledAndSpatial(torch_fidelity_network(path)), checksum


class PooledAndSpatial(nn.Module):
    """torch-fidelity's network: uint8 (B, 3, H, W) -> its features, and a map of 17 x 17 cells."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        branch = self.network.Mixed_6d.branch1x1
        with branch.register_forward_hook(lambda _, inputs, output: seen.append(output)):
            features = self.network(images)[0]
        spatial = seen[0][:, :MAP_CHANNELS].permute(0, 2, 3, 1)  # TensorFlow's order
        return torch.cat([features, spatial.flatten(1)], dim=1)


def download() -> Path:
    """Downloads the published weights to torch.hub's folder, as torch-fidelity does."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if path.exists():
        return path
    say(f"Downloading the FID Inception weights (95 MB) to {path}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub has no time limit, and waits minutes offline
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), PUBLISHED_SHA256)
    except (OSError, RuntimeError) as error:
        raise ExtractorUnavailable(
            f"the FID Inception weights could not be downloaded ({error}); {HOW_TO_GET}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def torch_fidelity_network(path: Path) -> nn.Module:
    """Builds the network: uint8 (B, 3, H, W) -> a tuple with the features (B, 2048)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(path, weights_only=True)  # torch-fidelity itself would run code from the file
        return FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ExtractorUnavailable(
            f"{path} does not contain the weights of torch-fidelity's FID Inception; {HOW_TO_GET}"
        ) from error
