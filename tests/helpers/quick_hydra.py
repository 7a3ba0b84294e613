"""Makes Hydra compose in a tenth of its time by keeping the files it has read, and their merger.

A test composes two or three times, each time from 45 files that no test changes. Hydra keeps
files for one composition; here they are kept for the process, by path, time and size. PLAIN_HYDRA=1
in the environment of the tests leaves Hydra as it is.
"""

import copy
import pickle
from pathlib import Path

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

kept: dict[tuple, bytes] = {}
latest: dict[str, tuple] = {}  # the keys of the files that the present composition has read
merged: dict[tuple, bytes] = {}
read = ConfigRepository.load_config
merge = ConfigLoaderImpl._compose_config_from_defaults_list
choices = defaults_list._create_interpolation_map
NO_CHOICES = DictConfig({})


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


def shared(self, memo):
    """A copy with the same sources: each composition copies them, and all plugins' schemas."""
    return copy.copy(self)


def compose_quickly() -> None:
    ConfigRepository.load_config = read_once
    ConfigRepository.__deepcopy__ = shared
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
    defaults_list._create_interpolation_map = choices_if_asked
