"""Gives what is read from run folders of format 3 today's keys and names; no other file does.

Format 4 has one `objective.loss` in place of six keys, most of which excluded one another, and
conditionings with `labels`.
"""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import CLASS

FORMAT = 3  # the format that is read as today's
PLACE = "diffusion_lab.diffusion.objective."
MOVED = "diffusion_lab.profiling.", "diffusion_lab.estimate."  # of budgets
LOADED, IMAGES = "diffusion_lab.data.ImageDataModule", "diffusion_lab.data.ImageData"
PARTS = {"weighting": "weighting", "variance_loss": "variance", "uncertainty": "uncertainty"}
WHOLE = ("jump_loss", "score_loss")  # in the place of denoising, if they are not null
# of when a run tuned its study, of a logger of its own, and of what the data know
GONE = {"tuning": CLASS, "logger": "csv", "conditioning": "size"}
RENAMED = {f"{old}.": f"loss.{new}." for old, new in PARTS.items()} | {
    f"{old}.": "loss." for old in WHOLE
}


def config(saved: DictConfig) -> DictConfig:
    """The configuration of a run of format 3 as one of today's."""
    cfg = saved.copy()
    if CLASS in (cfg.get("logger") or {}):  # of when a run had one logger, without a name
        cfg.choices = cfg.logger.pop("choices", None)
        cfg.logger = {"wandb": cfg.logger}
    for group, key in GONE.items():
        (cfg.get(group) or {}).pop(key, None)
    if "weighting" in (cfg.get("objective") or {}):  # else it is of another family
        cfg.objective.loss = loss(cfg.objective)
    return cfg


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a run's summary.json as those of one of today."""
    return {"forward_passes": 3.0} | dict(found)  # before it was noted, a step had no more


def rename_classes(cfg: DictConfig) -> None:
    """Gives the classes of a run today's places; those of its own format may have moved since."""
    if CLASS in (cfg.get("budget") or {}):
        cfg.budget[CLASS] = str(cfg.budget[CLASS]).replace(*MOVED)
    if (cfg.get("data") or {}).get(CLASS) == LOADED:
        cfg.data[CLASS] = IMAGES


def loss(objective: DictConfig) -> DictConfig:
    """The loss of an objective of format 3, whose keys are taken out of it."""
    whole = [objective.pop(key, None) for key in WHOLE]
    parts = {new: objective.pop(old, None) for old, new in PARTS.items()}
    huber = objective.pop("huber", None)
    for part in (*whole, *parts.values()):
        for old, new in RENAMED.items() if isinstance(part, DictConfig) else ():
            part[CLASS] = str(part.get(CLASS)).replace(f"{PLACE}{old}", f"{PLACE}{new}")
    jumps, score = whole
    if isinstance(score, DictConfig):
        score.weighting = parts["weighting"]
    denoising = {CLASS: f"{PLACE}loss.Denoising", **parts, "huber": huber}
    return jumps or score or OmegaConf.create(denoising)


def checkpoint(content: dict[str, Any]) -> None:
    """Gives the weights of a checkpoint of format 3, in place, the names that they have today."""
    states = [each for each in content.values() if isinstance(each, dict)]
    for state in states:
        for name in [name for name in state if isinstance(name, str)]:
            state[today(name)] = state.pop(name)
        states += [each for each in state.values() if isinstance(each, dict)]


def today(name: str) -> str:
    """The name that a weight of format 3 has today."""
    name = re.sub(r"^objective\.uncertainty\.", "objective.loss.uncertainty.", name)
    return re.sub(r"\bconditioning\.(mean|std|examples)$", r"conditioning.labels.\1", name)
