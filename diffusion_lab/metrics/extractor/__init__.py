"""The networks that compute features."""

from diffusion_lab.metrics.extractor.classifier import Classifier
from diffusion_lab.metrics.extractor.efficientnet_lite0 import EfficientNetLite0, EfficientNetLite1
from diffusion_lab.metrics.extractor.inception import Inception
from diffusion_lab.metrics.extractor.timm_transformer import CLIP, DINOv2
