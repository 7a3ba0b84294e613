"""A W&B workspace and a report that compare the runs of a project."""

import importlib.util
import re

import wandb
from omegaconf import DictConfig

from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Range, one_of
from diffusion_lab.training.logger.reachability import why_unreachable

PROTOCOL = re.compile(r"[\w.-]+/train\w+-\w+")


def wandb_report(cfg: DictConfig, overrides: list[str]) -> dict[str, str]:
    """Creates a workspace and a report and returns their URLs; creates none if `cfg.dry_run`."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(
            "wandb-report needs the package wandb-workspaces; "
            "write pip install 'diffusion-lab[report]'"
        )
    from diffusion_lab.analysis.wandb_workspace import GROUPS, Dashboard

    protocol = Range(
        "the part of a metric's name after fid/",
        lambda value: bool(PROTOCOL.fullmatch(str(value))),
        "efficientnet_lite0-96/train60k-5k",
    )
    check_keys(cfg, {"group_by": one_of(*GROUPS), "protocol": protocol})
    if not cfg.dry_run and (reason := why_unreachable()):
        raise UserError(f"nothing was created: {reason}; dry_run=true shows what would be")
    group = None if cfg.group is None else str(cfg.group)
    dashboard = Dashboard(str(cfg.project), cfg.protocol, cfg.group_by, group)
    if cfg.dry_run:
        for title, panels in dashboard.sections().items():
            titles = (getattr(panel, "title", None) or type(panel).__name__ for panel in panels)
            say(f"{title}: {'; '.join(titles)}")
        say("Nothing was created (dry_run=true)")
        return {}
    try:
        entity = str(cfg.entity or wandb.Api().default_entity)
        made = {
            "workspace": dashboard.workspace(entity).save().url,
            "report": dashboard.report(entity).save().url,
        }
    except Exception as error:  # a wrong key, project or server: each has its own class
        raise UserError(f"W&B refused this: {str(error).splitlines()[0]}") from error
    for what, url in made.items():
        say(f"{what.capitalize()}: {url}")
    return made
