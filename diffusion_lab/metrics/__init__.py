"""Extractors of features, distances between feature sets, and the metrics made of both."""

from .distances import FeatureSet, frechet, frechet_distance, kid, moments
from .features import ExtractorUnavailable, FeatureExtractor
from .generative import GenerativeMetrics
from .report import ceiling, report, side_by_side

__all__ = [
    "ExtractorUnavailable",
    "FeatureExtractor",
    "FeatureSet",
    "GenerativeMetrics",
    "ceiling",
    "frechet",
    "frechet_distance",
    "kid",
    "moments",
    "report",
    "side_by_side",
]
