"""Loggers of metrics: a plain JSON-lines file, always, and those that are chosen.

Every row carries `images` (training images seen) and `seconds` (of training), so that curves of
different batch sizes, machines and numbers of pictures share an x-axis.
"""

from diffusion_lab.training.logger.dashboards import MLflow, TensorBoard, Trackio
from diffusion_lab.training.logger.run_logger import (
    Clock,
    JSONLines,
    RunLogger,
    build_loggers,
    check_loggers,
)
from diffusion_lab.training.logger.wandb_logger import WandB, chosen
