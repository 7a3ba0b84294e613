"""Loggers of metrics: a plain JSON-lines file, always, and those that are chosen.

Every row carries `images` (training images seen) and `seconds` (of training), so that curves of
different batch sizes, machines and numbers of pictures share an x-axis.
"""

from diffusion_lab.training.logger.mlflow_logger import MLflow
from diffusion_lab.training.logger.run_logger import (
    JSONLines,
    RunLogger,
    build_loggers,
    check_loggers,
)
from diffusion_lab.training.logger.tensorboard_logger import TensorBoard
from diffusion_lab.training.logger.trackio_logger import Trackio
from diffusion_lab.training.logger.wandb_logger import WandB, chosen
