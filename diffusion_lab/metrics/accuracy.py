"""The share of samples that a classifier reads as the class that was asked for."""

import torch

from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.metric import HIGHER, ImageSet, Metric, Quantity
from diffusion_lab.metrics.protocol import short_count


class Accuracy(Metric):
    """The accuracy of `classifier` on samples, whose labels are the classes asked for."""

    meaning = "samples that a classifier reads as the class asked for"
    quantities = (Quantity("accuracy", "Accuracy", meaning, HIGHER, percent=True),)
    needs_labels = True

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def measure(self, generated: ImageSet, reference: ImageSet) -> dict[str, float]:
        right = torch.as_tensor(generated.guesses == generated.labels)
        return {"accuracy": right.double().mean().item()}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{self.classifier.name}/{short_count(len(generated))}"
