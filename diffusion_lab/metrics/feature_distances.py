"""Distances between features: FID and KID of all images, FID on other features, and by class."""

from diffusion_lab.common.ranges import ranges, whole
from diffusion_lab.metrics.distances import frechet, frechet_of_halves, kid, mind, mmd
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.base import SPATIAL
from diffusion_lab.metrics.image_set import ImageSet, short_count
from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.observer import CLASSIFIED
from diffusion_lab.metrics.quantity import named


class FID(Metric):
    """The FID (arXiv:1706.08500), its standard deviation over samples, and FID-infinity.

    The latter two come from `half_splits` random halvings of the samples: the standard deviation is
    an overestimate, and FID-infinity is valid only for several times more samples than features.
    """

    quantities = named("fid", "fid_infinity")
    needs_images = False

    @ranges(half_splits=whole(0))
    def __init__(self, half_splits: int = 5):
        super().__init__()
        self.half_splits = half_splits

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        others = reference.given or reference.statistics
        fid = frechet(generated.statistics, others)
        if not self.half_splits or len(generated) < 4:
            return {"fid": fid}
        halves = frechet_of_halves(generated.statistics, others, self.half_splits)
        deviation = halves.std(correction=0).item()
        return {"fid": fid, "fid_std": deviation, "fid_infinity": 2 * fid - halves.mean().item()}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        name = reference.given.name if reference.given else reference.name
        return f"{generated.extractor.name}/{name}-{short_count(len(generated))}"


class KID(Metric):
    """The KID (arXiv:1801.01401) on all pairs of images, without bias."""

    quantities = named("kid")

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        return {"kid": kid(generated.statistics, reference.statistics)}


class MMD(Metric):
    """The estimator of CMMD (arXiv:2401.09603) on any features; on CLIP's it is CMMD."""

    quantities = named("mmd")

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        return {"mmd": mmd(generated.statistics, reference.statistics)}


class MIND(Metric):
    """The sliced Wasserstein distance of MIND (arXiv:2605.06797), which needs few samples."""

    quantities = named("mind")

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        return {"mind": mind(generated.statistics, reference.statistics)}


class SpatialFID(Metric):
    """The Fréchet distance of the extractor's map, which sees where in an image something is.

    On Inception's features it is sFID (arXiv:2103.03841), which a file's statistics may serve; on
    others, values are not comparable with published ones.
    """

    quantities = named("spatial_fid")
    needs_images = False

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        if SPATIAL not in reference.moments:
            return {}  # a file has no statistics of it
        return {"spatial_fid": frechet(generated.moments[SPATIAL], reference.moments[SPATIAL])}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        moments = reference.moments.get(SPATIAL)
        name = getattr(moments, "name", "") or reference.name
        return f"{generated.extractor.name}/{name}-{short_count(len(generated))}"


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
        """The FID of images of a single class."""
        return {"fid_class": frechet(reference.statistics, generated.statistics)}

    def results(self, generated: ImageSet, reference: ImageSet, suffix: str = "") -> Values:
        values = {}
        for label in reference.required_labels.unique().tolist():
            ours, real = (x.select(x.required_labels == label) for x in (generated, reference))
            if min(len(ours), len(real)) >= 2:
                name = f"fid_class{label}{suffix}/{self.protocol(ours, real)}"
                values[name] = self.measure(ours, real)["fid_class"]
        return values
