"""Loggers of metrics: a plain JSON-lines file, always, and Weights & Biases.

Every row carries `images` (training images seen) and `seconds` (of training), so that curves of
different batch sizes, machines and numbers of pictures share an x-axis.
"""

from diffusion_lab.training.logger.json_lines import JSONLines
from diffusion_lab.training.logger.wandb_logger import WandB, chosen
