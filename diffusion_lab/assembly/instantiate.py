"""Builds objects from configuration nodes; errors name the full key of the wrong value."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin
from warnings import filterwarnings

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from diffusion_lab.assembly.config_keys import as_path
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Range, RangeError, written

filterwarnings("ignore", "hydra.utils.instantiate", UserWarning)  # Hydra 1.4 wants a list of names
OURS = "diffusion_lab."  # starts the modules of the classes of parts


def instantiate(cfg: DictConfig, key: str, **facts: object) -> Any:
    """Builds the object that the node `key` configures, children first; None for an empty node.

    A node with `_partial_: true` becomes a `Factory`. `facts` replace settings of the node itself.
    """
    node = OmegaConf.select(cfg, key, throw_on_missing=True)
    return _built(node, key, facts)


@dataclass(frozen=True)
class Factory:
    """A class and its settings, to be called with facts that the configuration does not know."""

    target: partial
    key: str
    settings: dict[str, Any]

    def __call__(self, *args: object, **facts: object) -> Any:
        """Builds the object; facts replace settings."""
        arguments = self.settings | facts
        self._check_names(args, arguments)
        self._check_parts()
        with naming_keys(self.key, {name: f"{self.key}.{name}" for name in self.settings}):
            return self.target(*args, **arguments)

    def _check_parts(self) -> None:
        """Raises UserError for a plain value in place of a part, an object with settings."""
        parameters = inspect.signature(self.target.func).parameters
        for name, value in self.settings.items():
            hint = parameters[name].annotation if name in parameters else Any
            if is_plain(value) and not any(takes(value, each) for each in alternatives(hint)):
                key = f"{self.key}.{name}"
                group = key.replace(".", "/")
                choose = f"choose one with {group}=..., and " * (conf_dir() / group).is_dir()
                raise UserError(
                    f"{key}={written(value)} is a part with settings of its own; {choose}write its "
                    f"keys as in {key}.KEY=VALUE"
                )

    def _check_names(self, args: tuple, arguments: dict[str, Any]) -> None:
        """Raises UserError unless the target takes exactly these arguments."""
        signature, name = inspect.signature(self.target.func), self.target.func.__name__
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        strangers = self.settings.keys() - signature.parameters.keys()
        if strangers and inspect.Parameter.VAR_KEYWORD not in kinds:
            keys = ", ".join(f"{self.key}.{each}" for each in sorted(strangers))
            raise UserError(
                f"{keys}: {name} has no such argument; remove it, or write ~ before the key "
                "where an experiment sets it"
            )
        try:
            signature.bind(*args, **arguments)
        except TypeError as error:
            raise UserError(f"{self.key} does not fit {name}: {error}") from error


def is_plain(value: object) -> bool:
    """Whether a value is as written in a configuration, and no object that was built."""
    return value is None or isinstance(value, bool | int | float | str | list | dict)


def is_own(part: object) -> bool:
    """Whether the class of a part is somebody's own, and not of this package."""
    return not type(part).__module__.startswith(OURS)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a type hint allows."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def takes(value: object, hint: Any) -> bool:
    """Whether an argument of this type may have a plain value; its range says which."""
    kind = get_origin(hint) or hint
    if kind in (Mapping, dict):
        return isinstance(value, dict)
    if kind is NoneType:
        return value is None
    return kind is not Callable and not str(getattr(kind, "__module__", "")).startswith(OURS)


@contextmanager
def naming_keys(key: str, settings: Mapping[str, str]) -> Iterator[None]:
    """Raises the errors of a configured object as UserErrors that begin with the full key.

    `settings` maps names of arguments to their full keys. A UserError passes unchanged, since it
    names the key of an inner object already.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        text = str(error)
        name = re.split(r"[ =]", text, maxsplit=1)[0]
        if name not in settings:
            text = f"{key}: {text}" if key else text
        elif isinstance(error, RangeError):
            text = error.of(settings[name])
        else:
            text = settings[name] + text.removeprefix(name)
        raise UserError(text) from error
    except TypeError as error:
        raise UserError(f"a value of {key} does not fit: {error}") from error
    except (ImportError, OSError) as error:
        raise UserError(f"{key} cannot be used: {error}") from error


@contextmanager
def errors_at(cfg: DictConfig, key: str) -> Iterator[None]:
    """Puts full keys into the errors of the object configured at `key`; "" is the root."""
    settings: dict[str, str] = {}
    nodes = [(OmegaConf.select(cfg, key), key)] if key else []
    for node, place in nodes:  # the list grows here: inner objects come after outer ones
        for name in map(str, node if isinstance(node, DictConfig) else ()):
            settings.setdefault(name, f"{place}.{name}")
            nodes.append((OmegaConf.select(node, name), f"{place}.{name}"))
    with naming_keys(key, settings):
        yield


def check_keys(cfg: DictConfig, allowed: dict[str, Range]) -> None:
    """Raises UserError for the first of these keys whose value is out of its range."""
    for key, allowed_range in allowed.items():
        try:
            allowed_range.check(key, OmegaConf.select(cfg, key))
        except RangeError as error:
            raise UserError(error.of(key)) from error


def _built(node: Any, key: str, facts: dict[str, object]) -> Any:
    if isinstance(node, ListConfig):
        return [_built(each, f"{key}[{place}]", {}) for place, each in enumerate(node)]
    if not isinstance(node, DictConfig):
        return as_path(key, node)
    children = {}
    for name in map(str, node):
        if name not in ("_target_", "_partial_", *facts):
            children[name] = _built(node[name], f"{key}.{name}", {})
    if "_target_" not in node and not OmegaConf.is_missing(node, "_target_"):
        return children
    factory = Factory(target_of(node, key), key, children)
    return factory if node.get("_partial_", False) else factory(**facts)


def class_of(cfg: DictConfig, key: str) -> type | None:
    """The class that the node `key` configures; None if it names none, or a function."""
    node = OmegaConf.select(cfg, key)
    named = isinstance(node, DictConfig) and "_target_" in node
    target = target_of(node, key).func if named else None
    return target if isinstance(target, type) else None


def target_of(node: DictConfig, key: str) -> partial:
    """Looks up the class that the node at `key` names; raises UserError if Hydra refuses it."""
    try:
        return hydra.utils.instantiate({"_target_": node["_target_"], "_partial_": True})
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{key}._target_={node['_target_']} cannot be used: {reason}") from error
