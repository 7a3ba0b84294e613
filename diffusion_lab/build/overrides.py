"""Parses Hydra's overrides."""

from collections.abc import Iterable
from dataclasses import dataclass

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


@dataclass(frozen=True)
class Combination:
    """One combination of comma-separated values, as in steps=5,10, and its configuration."""

    chosen: dict[str, str]  # values by key
    cfg: DictConfig
    overrides: list[str]

    @property
    def name(self) -> str:
        """The values that were chosen, as they are written; empty for none."""
        return " ".join(f"{key}={value}" for key, value in self.chosen.items())


def parse(overrides: Iterable[str]) -> list[Override]:
    """Parses overrides as Hydra does; raises its OverrideParseException for an invalid one."""
    return OverridesParser.create().parse_overrides(list(overrides))


def values_of(overrides: Iterable[str]) -> dict[str, object]:
    """The values that overrides set, by key."""
    return {each.key_or_group: each.value() for each in parse(overrides)}


def unquoted(text: str) -> str:
    """A value of an override without its quotes and escapes, which Hydra writes in several ways."""
    value = parse([f"key={text}"])[0].value()
    return value if isinstance(value, str) else text


def key_of(override: Override) -> str:
    """The key or group that an override sets, with its package if it has one."""
    return override.get_key_element().lstrip("+~")


def own_places() -> list[str]:
    """The flag --config-dir of this command, if it has one, for processes that compose it again."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    return [f"--config-dir={each.path}" for each in sources if each.provider == "command-line"]
