"""The networks that features are taken from."""

from .classifier import Classifier
from .dinov2 import DINOv2
from .efficientnet_lite0 import EfficientNetLite0
from .inception import Inception

__all__ = ["Classifier", "DINOv2", "EfficientNetLite0", "Inception"]
