"""The networks that features are taken from."""

from .classifier import Classifier
from .efficientnet_lite0 import EfficientNetLite0
from .inception import Inception

__all__ = ["Classifier", "EfficientNetLite0", "Inception"]
