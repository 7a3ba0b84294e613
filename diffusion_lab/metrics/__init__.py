"""Extractors of features, distances between feature sets, and the metrics made of both."""

from .distances import FeatureSet, frechet, frechet_distance, kid, moments
from .features import ExtractorUnavailable, FeatureExtractor
from .generative import GenerativeMetrics, report

__all__ = [
    "ExtractorUnavailable",
    "FeatureExtractor",
    "FeatureSet",
    "GenerativeMetrics",
    "frechet",
    "frechet_distance",
    "kid",
    "moments",
    "report",
]
