"""The networks that compute features."""

from diffusion_lab.metrics.extractor.classifier import Classifier
from diffusion_lab.metrics.extractor.clip import CLIP
from diffusion_lab.metrics.extractor.dinov2 import DINOv2
from diffusion_lab.metrics.extractor.efficientnet_lite0 import EfficientNetLite0, EfficientNetLite1
from diffusion_lab.metrics.extractor.inception import Inception
