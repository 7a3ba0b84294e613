"""The share of samples that a classifier reads as the class that was asked for."""

from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.metric import ImageSet, Metric, Quantity
from diffusion_lab.metrics.protocol import short_count


class Accuracy(Metric):
    """The accuracy of `classifier` on samples, whose labels are the classes asked for."""

    quantities = (
        Quantity(
            "accuracy",
            "Accuracy",
            "samples that a classifier reads as the class asked for",
            higher_is_better=True,
            percent=True,
        ),
    )
    needs_labels = True

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def measure(self, generated: ImageSet, reference: ImageSet) -> dict[str, float]:
        return {"accuracy": (generated.guesses == generated.labels).double().mean().item()}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{self.classifier.name}/{short_count(len(generated))}"
