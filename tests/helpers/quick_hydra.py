"""Makes Hydra compose in a tenth of its time by keeping the files it has read, and their merger.

A test composes two or three times, each time from 45 files that no test changes. Hydra keeps
files for one composition; here they are kept for the process, by path, time and size. And it copies
whole configurations several times in each command, which pickle does faster.
"""

import copy
import functools
import pickle
import sys
from pathlib import Path

import hydra.utils
import omegaconf.base
import omegaconf.omegaconf
import yaml
from hydra import version
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.default_element import ConfigDefault, GroupDefault
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import OmegaConfDumper
from omegaconf.base import Box, Node

kept: dict[tuple, bytes] = {}
latest: dict[str, tuple] = {}  # the keys of the files that the present composition has read
merged: dict[tuple, bytes] = {}
read = ConfigRepository.load_config
merge = ConfigLoaderImpl._compose_config_from_defaults_list
choices = defaults_list._create_interpolation_map
deepcopy = DictConfig.__deepcopy__
NO_CHOICES = DictConfig({})
instantiate = hydra.utils.instantiate
classes: dict[str, functools.partial] = {}
LOOKED_UP = {"_target_", "_partial_"}


def read_once(self, config_path):
    source = self._find_object_source(config_path, ObjectType.CONFIG)
    if source is None:
        return read(self, config_path)
    stamp = None
    if isinstance(source, FileConfigSource):
        name = Path(source.path.removeprefix("file://"), source._normalize_file_name(config_path))
        stamp = (name.stat().st_mtime_ns, name.stat().st_size)
    key = latest[config_path] = (source.path, config_path, stamp)
    if key not in kept:
        kept[key] = pickle.dumps(read(self, config_path))
    return pickle.loads(kept[key])  # a composition changes the files' content


def merge_once(self, defaults, repo):
    for each in defaults:
        repo.load_config(each.config_path)
    key = tuple((latest[each.config_path], each.package, each.primary) for each in defaults)
    if key not in merged:
        cfg = merge(self, defaults, repo)
        OmegaConf.clear_cache(cfg)  # it has the time
        merged[key] = pickle.dumps(cfg)
    return pickle.loads(merged[key])


def choices_if_asked(overrides, defaults, self_added):
    """Leaves out earlier choices, which only ${...} in a defaults list needs: we have none."""
    if any(default.is_interpolation() for default in defaults):
        return choices(overrides, defaults, self_added)
    return NO_CHOICES


def keep_sources(self, delegate):
    """Leaves out a copy of all sources, which nobody changes, with the store of Hydra's own."""
    self.delegate = copy.copy(delegate)
    self.cache = {}


def copy_by_pickle(self, memo):
    """Copies in a third of the time; like omegaconf's copy, this one keeps the parent."""
    if not isinstance(self.__dict__["_content"], dict):
        return deepcopy(self, memo)
    kept = [(n, n.__dict__["_parent"]) for n in (self, *self.__dict__["_content"].values())]
    try:
        for node, _ in kept:
            node.__dict__["_parent"] = None
        new = pickle.loads(pickle.dumps(self))
    except Exception:  # of a value that is no plain one
        new = None
    finally:
        for node, parent in kept:
            node.__dict__["_parent"] = parent
    if new is None:
        return deepcopy(self, memo)
    new.__dict__["_parent"] = self.__dict__["_parent"]
    for node in new.__dict__["_content"].values():
        node.__dict__["_parent"] = new
    return new


def look_up_once(config, *args, **kwargs):
    """Asks Hydra once whether a class may be built, unless another one has taken its name."""
    if args or kwargs or not isinstance(config, dict) or set(config) != LOOKED_UP:
        return instantiate(config, *args, **kwargs)
    name = str(config["_target_"])
    module, _, word = name.rpartition(".")
    here = getattr(sys.modules.get(module), word, None)
    if here is None or getattr(classes.get(name), "func", None) is not here:
        classes[name] = instantiate(config)
    return classes[name]


class QuickDumper(yaml.CDumper):
    """Writes the text of omegaconf's own dumper, which is not in C."""


QuickDumper.add_representer(str, OmegaConfDumper.str_representer)


def re_parent(box):
    """Does the same as omegaconf's, which imports two modules for each value of each box."""
    content = box.__dict__["_content"]
    if isinstance(content, Node):  # of a union
        content = [content]
    elif isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, list):
        return
    for value in content:
        if value is not None:
            value._set_parent(box)
            if isinstance(value, Box):
                re_parent(value)


def compose_quickly() -> None:
    yaml.SafeLoader = yaml.CSafeLoader
    ConfigRepository.load_config = read_once
    CachingConfigRepository.__init__ = keep_sources
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
    defaults_list._create_interpolation_map = choices_if_asked
    ConfigDefault.is_interpolation = lambda self: "${" in self.path
    GroupDefault.is_interpolation = lambda self: self.is_name() and "${" in str(self.value)
    version._get_version = functools.cache(version._get_version)
    Box._re_parent = re_parent
    DictConfig.__deepcopy__ = copy_by_pickle
    hydra.utils.instantiate = look_up_once
    omegaconf.omegaconf.get_omega_conf_dumper = lambda: QuickDumper
    omegaconf.base.parse = functools.cache(omegaconf.base.parse)  # parses "${...}"
