"""A W&B workspace and a report that compare the runs of a project."""

import importlib.util

import wandb
from omegaconf import DictConfig

from diffusion_lab.analysis.wandb_runs import PROTOCOL, key_of, logged_runs, protocol_of
from diffusion_lab.build.config_keys import as_list
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import optional
from diffusion_lab.training.logger.reachability import why_unreachable


def wandb_report(cfg: DictConfig, overrides: list[str]) -> dict[str, str]:
    """Creates a workspace and a report and returns their URLs; creates none if `cfg.dry_run`."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(
            "wandb-report needs the package wandb-workspaces; "
            "write pip install 'diffusion-lab[report]'"
        )
    from diffusion_lab.analysis.wandb_workspace import Dashboard

    check_keys(cfg, {"protocol": optional(PROTOCOL)})
    project, group = str(cfg.project), None if cfg.group is None else str(cfg.group)
    runs = list(logged_runs([str(path) for path in as_list(cfg.paths)], project, group))
    protocol = cfg.protocol or protocol_of(runs, project)
    names = [str(name) for name in as_list(cfg.group_by)]
    if not names:
        raise UserError("group_by=[] is empty; write one or more keys, as in group_by=backbone")
    keys = {name: key_of(name, runs) for name in names}
    dashboard = Dashboard(project, protocol, keys, group)
    if not cfg.dry_run and (reason := why_unreachable()):
        raise UserError(f"nothing was created: {reason}; dry_run=true shows what would be")
    say(f"{dashboard.title}, FID by {protocol}")
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
