"""The networks that features are taken from."""

from .efficientnet_lite0 import EfficientNetLite0
from .inception import Inception

__all__ = ["EfficientNetLite0", "Inception"]
