"""diffusion-lab train."""

from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion_lab import slurm
from diffusion_lab.parts import Parts
from diffusion_lab.progress import say
from diffusion_lab.runs import CONFIG, load_summary, restarted, resumed
from diffusion_lab.training import build_parts, train


def run(cfg: DictConfig, command: str = "train", build: Callable[..., Parts] = build_parts) -> None:
    """Trains one composition; a job of a multirun is a run of the sweep's W&B group.

    A job of SLURM that was requeued goes on with the run that it began with the same overrides.
    """
    job = HydraConfig.get()
    overrides = list(job.overrides.task)
    begun = None if cfg.resume else slurm.own_run(cfg.name, cfg.run_dir, command, overrides)
    if begun and (begun / CONFIG).is_file():
        if load_summary(begun).get("finished"):
            say(f"{begun} is finished")
            return
        cfg = restarted(begun)
    elif cfg.resume:
        cfg = resumed(cfg.resume, overrides, command)
    elif job.mode == RunMode.MULTIRUN and cfg.logger and not cfg.logger.group:
        group = job.sweep.dir.rsplit("/", 1)[-1]
        cfg.logger.group = group
        overrides.append(f"logger.group={group}")
    train(cfg, overrides, build)
