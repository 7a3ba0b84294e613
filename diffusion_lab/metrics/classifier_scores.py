"""Scores by classifiers: the Inception Score, and the accuracy of samples of known classes."""

import math

import torch
from torch import Tensor

from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.image_set import ImageSet, short_count
from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.quantity import named

PARTS = 10  # as published; the score depends on the size of the parts


def inception_score(logits: Tensor) -> float:
    """The Inception Score exp E KL(p(y | x) || p(y)), from 1 to K classes (arXiv:1606.03498).

    It is the mean over ten consecutive parts of the logits (n, K), or over n parts if n < 10.
    """
    scores = []
    for part in logits.double().tensor_split(min(PARTS, len(logits))):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


class InceptionScore(Metric):
    """The Inception Score, for extractors that are classifiers; it needs no reference."""

    quantities = named("inception_score")
    needs_images = False

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        logits = generated.extractor.logits(generated.features)
        return {} if logits is None else {"inception_score": inception_score(logits.cpu())}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{generated.extractor.name}/{short_count(len(generated))}"


class Accuracy(Metric):
    """The share of samples that `classifier` assigns to the class they were drawn for."""

    quantities = named("accuracy")
    needs_labels, needs_images = True, False

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        right = torch.as_tensor(generated.guesses == generated.labels)
        return {"accuracy": right.double().mean().item()}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{self.classifier.name}/{short_count(len(generated))}"
