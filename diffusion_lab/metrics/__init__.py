"""Feature extractors, distances between sets of features, and the metrics built from both."""

from diffusion_lab.metrics.distances import FeatureSet, frechet, kid
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable, FeatureExtractor
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.image_set import ImageSet
from diffusion_lab.metrics.metric import REAL, Metric, Quantity
from diffusion_lab.metrics.prepared import PreparedMetrics
from diffusion_lab.metrics.quantities import ceiling, report, side_by_side
