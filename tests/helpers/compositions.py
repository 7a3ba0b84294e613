"""Puts configurations together from options that Hydra composes once each."""

import copy
from functools import cache

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from helpers.paths import CONF

TINY_NETWORK = ("backbone=dit", "backbone.width=16", "backbone.heads=2", "backbone.depth=1")


@cache
def node(group: str, option: str):
    """The configuration that an option puts into its group."""
    cfg = composed(None, f"+{group}={option}")
    return OmegaConf.select(cfg, group.replace("/", "."), default=None)


@cache
def composed(name: str | None, *overrides: str) -> DictConfig:
    """The cached configuration of a command with these overrides; callers must not change it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=[*overrides])


def assembled(*overrides: str) -> DictConfig:
    """A tiny model's training configuration with the given options and values."""
    cfg = copy.deepcopy(composed("train", "name=x", *TINY_NETWORK))
    with open_dict(cfg):
        for override in overrides:
            key, _, value = override.partition("=")
            is_group = (CONF / key).is_dir()
            chosen = node(key, value) if is_group else yaml.safe_load(value)
            OmegaConf.update(cfg, key.replace("/", "."), chosen, merge=not is_group)
    return cfg
