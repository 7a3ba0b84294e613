"""A small classifier trained on real FashionMNIST: does it read the class that was asked for?

    python experiments/conditioning/judge.py samples.npz [--data data]

prints its accuracy on the test split, and the share of samples whose class is their label.
`diffusion-lab sample run=... save=npz` writes such files. Two epochs, a minute on a CPU.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.data import FashionMNISTDataModule
from diffusion_lab.images import to_float

EPOCHS, BATCH, RATE = 2, 128, 2e-3


def classifier() -> nn.Module:
    """Images (B, 1, 28, 28) -> logits (B, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def trained(data: FashionMNISTDataModule) -> nn.Module:
    """The classifier after some passes over the training split, in evaluation mode."""
    torch.manual_seed(0)
    network = classifier()
    images, labels = to_float(data.train_images()), data.train_labels()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(network(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def agreement(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images, uint8 (N, 1, 28, 28), whose likeliest class is their label (N,)."""
    guesses = torch.cat([network(part).argmax(1) for part in to_float(images).split(500)])
    return (guesses == labels).float().mean().item()


def agreement_of_file(network: nn.Module, path: Path) -> float:
    """As `agreement`, of the array that `diffusion-lab sample save=npz` wrote."""
    with np.load(path, allow_pickle=False) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
        return agreement(network, images, torch.from_numpy(file["labels"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, nargs="+")
    parser.add_argument("--data", default="data")
    arguments = parser.parse_args()
    data = FashionMNISTDataModule(root=arguments.data)
    network = trained(data)
    print(f"test images: {agreement(network, data.test_images(), data.test_labels()):.3f}")
    for path in arguments.samples:
        print(f"{path}: {agreement_of_file(network, path):.3f}")


if __name__ == "__main__":
    main()
