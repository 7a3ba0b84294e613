"""The kernel distance of features (KID)."""

from diffusion_lab.metrics.distances import kid
from diffusion_lab.metrics.metric import LOWER, ImageSet, Metric, Quantity


class KID(Metric):
    """KID (arXiv:1801.01401) on all pairs of images, without bias."""

    quantities = (Quantity("kid", "KID", "squared MMD of features to training images", LOWER),)

    def measure(self, generated: ImageSet, reference: ImageSet) -> dict[str, float]:
        return {"kid": kid(generated.statistics, reference.statistics)}
