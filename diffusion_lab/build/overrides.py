"""Hydra's overrides, read."""

from hydra.core.override_parser.overrides_parser import OverridesParser


def values_of(overrides: list[str]) -> dict[str, object]:
    """What overrides set, by key."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {each.key_or_group: each.value() for each in parsed}
