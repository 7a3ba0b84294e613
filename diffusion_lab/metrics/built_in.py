"""Most metrics of the package: distances of features, scores of classifiers, and seams."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.common.randomness import random_places
from diffusion_lab.common.ranges import ranges, whole
from diffusion_lab.metrics.distances import FeatureSet, frechet, frechet_of_halves, kid, mind, mmd
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.base import FEATURES, SPATIAL
from diffusion_lab.metrics.extractor.classifier import SmallClassifier, accuracy_on, fit
from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.observer import CLASSIFIED, EDGES, ImageSet, short_count
from diffusion_lab.metrics.quantity import named


class FID(Metric):
    """The FID (arXiv:1706.08500), its standard deviation over samples, and FID-infinity.

    The latter two come from `half_splits` random halvings of the samples: the standard deviation is
    an overestimate, and FID-infinity is valid only for several times more samples than features.
    """

    quantities = named("fid", "fid_infinity")
    needs_images = False
    from_file = FEATURES

    @ranges(half_splits=whole(0))
    def __init__(self, half_splits: int = 5):
        super().__init__()
        self.half_splits = half_splits

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        others = reference.given.get(FEATURES) or reference.statistics
        fid = frechet(generated.statistics, others)
        if not self.half_splits or len(generated) < 4:
            return {"fid": fid}
        halves = frechet_of_halves(generated.statistics, others, self.half_splits)
        deviation = halves.std(correction=0).item()
        return {"fid": fid, "fid_std": deviation, "fid_infinity": 2 * fid - halves.mean().item()}


class Distance(Metric):
    """A metric that is one number of two sets of features."""

    between: Callable[[FeatureSet, FeatureSet], float]

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        value = self.between(generated.statistics, reference.statistics)
        return {self.quantities[0].name: value}


class KID(Distance):
    """The KID (arXiv:1801.01401) on all pairs of images, without bias."""

    quantities = named("kid")
    between = staticmethod(kid)


class MMD(Distance):
    """The estimator of CMMD (arXiv:2401.09603) on any features; on CLIP's it is CMMD."""

    quantities = named("mmd")
    between = staticmethod(mmd)


class MIND(Distance):
    """The sliced Wasserstein distance of MIND (arXiv:2605.06797), which needs few samples."""

    quantities = named("mind")
    between = staticmethod(mind)


class SpatialFID(Metric):
    """The Fréchet distance of the extractor's map, which sees where in an image something is.

    On Inception's features it is sFID (arXiv:2103.03841), which a file's statistics may serve; on
    others, values are not comparable with published ones.
    """

    quantities = named("spatial_fid")
    needs_images = False
    from_file = SPATIAL

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        others = reference.given.get(SPATIAL) or reference.moments.get(SPATIAL)
        return {"spatial_fid": frechet(generated.moments[SPATIAL], others)} if others else {}


class ClassifierFID(Metric):
    """The Fréchet distance of the features of `classifier`, which was trained on the data."""

    quantities = named("classifier_fid")

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        ours, real = (each.moments[CLASSIFIED] for each in (generated, reference))
        return {"classifier_fid": frechet(ours, real)}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{self.classifier.name}/{reference.name}-{short_count(len(generated))}"


class ClassFID(Metric):
    """The FID of the images of each class, with names like fid_class3/<extractor>/train6k-500.

    A class with fewer than 2 images on either side gets no value.
    """

    quantities = named("fid_class")
    needs_labels = by_class = True

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        return {"fid_class": frechet(reference.statistics, generated.statistics)}

    def results(self, generated: ImageSet, reference: ImageSet, suffix: str = "") -> Values:
        values = {}
        for label in reference.required_labels.unique().tolist():
            ours, real = (x.select(x.required_labels == label) for x in (generated, reference))
            if min(len(ours), len(real)) >= 2:
                name = f"fid_class{label}{suffix}/{self.protocol(ours, real)}"
                values[name] = self.measure(ours, real)["fid_class"]
        return values


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


class Seams(Metric):
    """The mean difference across the edges of patches over that inside of them.

    A network that writes each patch by itself leaves seams, which FID sees only in part. Real
    images have about 1; the value of test images stands beside it. Needs patches of at least 2
    pixels a side.
    """

    quantities = named("seams")
    needs_images = False

    @ranges(patch=whole(2))
    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        across, inside = generated.others[EDGES].mean(0).tolist()
        return {"seams": across / inside} if inside else {}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{self.patch}px/{short_count(len(generated))}"


EPOCHS = 10
SEED = 0  # of the network and of the order of its batches


class RealOrDrawn(Metric):
    """The accuracy of a network on equally many samples and real images that it has not seen.

    It is a classifier two-sample test (arXiv:1610.06545), in which no feature of another network
    and no class has a part: half of the images train the network. 0.5 means that it cannot tell
    them apart. The value of test images is 0.5 up to chance.
    """

    quantities = named("real_or_drawn")

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        if generated.images is None or reference.images is None:
            return {}
        count = min(len(generated), len(reference)) // 2  # to learn from, and to be asked about
        drawn = generated.images[: 2 * count]
        real = reference.images[random_places(len(reference), 2 * count)]
        learned, asked = ((drawn[half], real[half]) for half in (slice(count), slice(count, None)))
        return {"real_or_drawn": told_apart(learned, asked, generated.extractor.device)}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"cnn/{reference.name}-{short_count(len(generated))}"


def told_apart(
    learned: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], device: torch.device
) -> float:
    """The accuracy on the pair `asked` of a network that is trained on the pair `learned`.

    The four sets of images are uint8 (n, C, H, W). The caller switches gradients off, or does not.
    """
    labels = torch.arange(2).repeat_interleave(len(learned[0]))
    # gradients, as samples are measured where there are none
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(SEED)
        _, channels, height, width = learned[0].shape
        network = SmallClassifier((channels, height, width), 2).to(device)
        fit(network, torch.cat(learned).clone(), labels, EPOCHS)
    return accuracy_on(network.eval(), torch.cat(asked), labels)
