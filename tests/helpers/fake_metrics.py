"""Metrics on a tiny random network, and the data that they compare with."""

import torch
from torch import nn

from diffusion_lab.metrics import GenerativeMetrics, PreparedMetrics
from diffusion_lab.metrics.extractor.base import FeatureExtractor


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 4 * 4, 12, generator=generator) / 7)

    def forward(self, images):
        return (images.float().flatten(1) / 255 @ self.weight).tanh()


class FakeExtractor(FeatureExtractor):
    name, dim, preprocessing = "fake", 12, "x / 255"

    def __init__(self, weights="a"):
        self.weights = weights
        self.images_seen = 0

    def build(self):
        return Network(), self.weights

    def outputs(self, images):
        self.images_seen += len(images)
        return super().outputs(images)


class FakeSource:
    fingerprint = "data"
    native_shape = (1, 4, 4)
    class_names = ("even", "odd")

    def __init__(self, train=2000, test=300, validation=150):
        self.validation = validation
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (train + test, 1, 4, 4), generator=generator)
        self.train, self.test = images.to(torch.uint8).split([train, test])

    def reference_images(self):
        return self.train

    def reference_labels(self):
        return torch.arange(len(self.train)) % 2

    def validation_rows(self):
        return self.train[: self.validation]

    def validation_labels(self):
        return self.reference_labels()[: self.validation]

    def test_images(self):
        return self.test

    def test_labels(self):
        return torch.arange(len(self.test)) % 2


def prepared(folder, source=None, reference_size=None, num_samples=100, weights="a", **options):
    extractor = FakeExtractor(weights)
    metrics = GenerativeMetrics(extractor, reference_size, num_samples, str(folder), **options)
    source = source or FakeSource()
    metrics.load(source, "cpu")
    return PreparedMetrics.of(metrics, source)


def generated(count=100):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(50, 256, (count, 1, 4, 4), generator=generator).to(torch.uint8)


def values_of(metrics, images=None):
    """The values of samples in two classes, by the way that evaluations take."""
    images = generated(metrics.metrics.num_samples) if images is None else images
    return metrics.compute(metrics.metrics.observer(images), torch.arange(len(images)) % 2)
