"""diffusion-lab sync."""

import json
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from diffusion_lab.analysis import wandb_sync
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.progress import say
from diffusion_lab.training.logger.reachability import why_unreachable


def run(cfg: DictConfig) -> None:
    """Lists offline W&B runs, and uploads those that are not."""
    paths = cfg.paths if isinstance(cfg.paths, ListConfig) else [cfg.paths]
    runs = wandb_sync.find(Path(str(path)) for path in paths)
    waiting = [run for run in runs if not run.uploaded]
    for run in runs:
        say(f"{'to upload' if run in waiting else 'uploaded '}  {run.file.parent}")
    if not waiting:
        where = ", ".join(str(path) for path in paths)
        found = f"all {len(runs)} offline W&B runs are uploaded" if runs else "no offline W&B run"
        say(f"Nothing to upload in {where}: {found}")
    elif cfg.dry_run:
        say(f"{len(waiting)} of {len(runs)} would be uploaded; nothing was sent (dry_run=true)")
    elif reason := why_unreachable():
        raise UserError(f"nothing was uploaded: {reason}")
    else:
        wandb_sync.upload(waiting)
        say(f"Uploaded {len(waiting)}")
    if cfg.json:
        print(json.dumps({str(run.file.parent): run.uploaded for run in runs}))
