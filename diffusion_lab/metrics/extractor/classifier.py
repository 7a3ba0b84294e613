"""Features of a small classifier, trained by `diffusion-lab train-extractor` on the data itself."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from diffusion_lab.common import hashing
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.images import crop_to
from diffusion_lab.data import ImageData
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable, FeatureExtractor

HOW_TO_GET = "make one with `diffusion-lab train-extractor data=...`"


class SmallClassifier(nn.Module):
    """A small CNN: uint8 (B, C, H, W) -> features (B, 128), which `head` maps to logits (B, K)."""

    width = 128

    def __init__(self, shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels, height, width = shape
        self.stem = nn.Sequential(
            *layer(channels, 32),
            nn.MaxPool2d(2, ceil_mode=True),
            *layer(32, 64),
            *layer(64, 64),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Flatten(),
        )
        self.features = nn.Sequential(
            nn.Linear(64 * -(-height // 4) * -(-width // 4), self.width), nn.ReLU()
        )
        self.head = nn.Linear(self.width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.stem(images.float() / 127.5 - 1))


def layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def fit(
    network: SmallClassifier,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int = 128,
    lr: float = 2e-3,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Trains by AdamW and a one-cycle rate on images uint8 (N, C, H, W), labels int64 (N,)."""
    device = next(network.parameters()).device
    batches = max(1, len(images) // batch_size)  # one leftover image has no batch statistics
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size)[:batches]:
            logits = network.head(network(images[index].to(device)))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[index].to(device)).backward()
            optimizer.step()
            rate.step()
        on_epoch()


@torch.no_grad()
def accuracy_on(network: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of images, uint8 (N, C, H, W), whose likeliest class is their label (N,)."""
    device = next(network.parameters()).device
    guesses = [network.head(network(part.to(device))).argmax(1).cpu() for part in images.split(500)]
    return (torch.cat(guesses) == labels).double().mean().item()


class Classifier(FeatureExtractor):
    """The classifier in the file `path`: its last hidden layer, and the classes that it predicts.

    Its name contains the beginning of the file's checksum: retraining makes a different metric.
    """

    dim = SmallClassifier.width
    preprocessing = "as it is, x / 127.5 - 1"
    argument = "path"  # the argument that holds the path, with which errors begin

    def __init__(self, path: str):
        self.path = Path(path)

    def build(self) -> tuple[nn.Module, str]:
        if not self.path.is_file():
            raise ExtractorUnavailable(f"{self.argument}={self.path} does not exist; {HOW_TO_GET}")
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
            self.shape, self.classes = tuple(facts["shape"]), facts["classes"]
            network = SmallClassifier(self.shape, len(self.classes))
            network.load_state_dict(load(self.path.read_bytes()))  # float16 becomes float32
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ExtractorUnavailable(
                f"{self.argument}={self.path} is damaged or is not a classifier; delete it and "
                f"{HOW_TO_GET}"
            ) from error
        checksum = hashing.of_file(self.path)
        self.channels = self.shape[0]
        self.name = name_of(checksum)
        return network, checksum

    def check(self, source: ImageData) -> None:
        """Raises ExtractorUnavailable unless trained on images of this shape and these classes."""
        if (self.shape, self.classes) != (tuple(source.native_shape), list(source.class_names)):
            raise ExtractorUnavailable(
                f"{self.argument}={self.path} was trained on images of shape {self.shape} in the "
                f"classes {', '.join(self.classes)}, but the data are of shape "
                f"{tuple(source.native_shape)} in {', '.join(source.class_names)}; {HOW_TO_GET} "
                "for these data"
            )

    def logits(self, features: Tensor) -> Tensor:
        """The logits (n, K), float32, of the classifier's classes."""
        with torch.no_grad(), self.in_float32():
            return self.network.head(features.to(self.device))

    def log_probability(self, x0: Tensor, labels: Tensor) -> Tensor:
        """log p(label | x0), (B,), of images x0 (B, C, H, W) in [-1, 1]; differentiable in x0.

        Padded images are cropped to the size that the network was trained on.
        """
        network = self.network.to(x0.device)
        images = (crop_to(x0, *self.shape[1:]) + 1) * 127.5
        with self.in_float32():
            logits = network.head(network(images))
        return F.log_softmax(logits, 1).gather(1, labels[:, None]).squeeze(1)


def name_of(checksum: str) -> str:
    """The name of a classifier in names of metrics, by the sha256 of its file."""
    return f"classifier-{checksum[:8]}"


def halved(path: Path) -> bytes:
    """The file of a classifier in half precision; its facts have the checksum of the file `path`.

    Other weights have another checksum, so metrics measured with it have other names.
    """
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    facts["sha256_of_original"] = hashing.of_file(path)
    weights = {name: half(tensor) for name, tensor in load(path.read_bytes()).items()}
    return save(weights, {"facts": json.dumps(facts)})


def half(tensor: Tensor) -> Tensor:
    """A tensor in float16, unless it has whole numbers or values that are too large for that."""
    small = tensor.half()
    return small if tensor.is_floating_point() and small.isfinite().all() else tensor


def save_classifier(network: SmallClassifier, path: Path, facts: dict) -> None:
    """Writes weights and plain `facts`, among them shape and classes, atomically."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(path, save(weights, {"facts": json.dumps(facts)}))
