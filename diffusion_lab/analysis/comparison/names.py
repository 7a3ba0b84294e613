"""Names of compositions: as few settings as distinguish each from the others."""

import json
import re
from collections import Counter
from collections.abc import Sequence

from diffusion_lab.build.config_keys import CLASS, DATA_SIZE, Settings

BETWEEN = " \N{MIDDLE DOT} "  # separates the settings in a name
ALL = "all runs"
CHECKSUM = re.compile("[0-9a-f]{64}")  # a sha256
SHOWN = 12  # characters of a checksum in a name
HEADS = "backbone.heads"  # they follow from a width that a budget finds, and say less


def varying(settings: list[Settings]) -> list[str]:
    """The keys whose values differ: classes first, keys by their nesting, heads last."""
    keys = {key for each in settings for key in each}
    found = [key for key in keys if len({_word(each.get(key)) for each in settings}) > 1]
    return sorted(
        found, key=lambda key: (not key.endswith(CLASS), key == HEADS, key.count("."), key)
    )


def names_of(settings: list[Settings], keys: list[str]) -> list[str]:
    """A name for each of `settings`, made of the first of `keys` that distinguish all of them."""
    chosen: list[str] = []
    distinct = 1
    for key in keys:
        parts = {tuple(_word(each.get(k)) for k in [*chosen, key]) for each in settings}
        if len(parts) > distinct:
            distinct = len(parts)
            chosen.append(key)
    last = Counter(_shortest(key) for key in chosen)
    names = [
        BETWEEN.join(
            filter(None, (part(key, each, last) for key in _needed(each, settings, chosen)))
        )
        for each in settings
    ]
    # a name must say more than the size of the data, unless nothing else differs
    nameless = sum(not _apart_from_data(name) for name in names)
    if len(set(names)) < len(names) or not all(names) or 0 < nameless < len(names):
        words = [[_spelled(key, each) for key in chosen] for each in settings]
        if len(set(map(tuple, words))) < len(words):  # classes of one name in two modules
            words = [[f"{key}={_word(each.get(key))}" for key in chosen] for each in settings]
        return [BETWEEN.join(own) for own in words] if chosen else [ALL]
    return names


def _spelled(key: str, settings: Settings) -> str:
    """A key and its value, of a class as one writes it: coupling=OptimalTransport, or none."""
    value = settings.get(key)
    if key.endswith(CLASS):
        kind = "none" if value is None else str(value).rpartition(".")[2]
        return f"{key.removesuffix(f'.{CLASS}')}={kind}"
    return f"{key}={_word(value)}"


def _needed(own: Settings, settings: Sequence[Settings], keys: Sequence[str]) -> list[str]:
    """The keys without those of a part, such as backbone, that its class determines."""

    def determined(key: str) -> bool:
        kind = f"{key.partition('.')[0]}.{CLASS}"
        alike = [each for each in settings if each.get(kind) == own.get(kind)]
        return kind in keys and kind != key and len({_word(each.get(key)) for each in alike}) == 1

    return [key for key in keys if not determined(key)]


def part(key: str, settings: Settings, last: Counter) -> str | None:
    """The part of a name for a key: the class, or the last part of the key and its value.

    A setting that is true is named by its key, and left out where it is false.
    """
    value = settings.get(key)
    if value is None:
        return f"{_shortest(key)}=null" if key in DATA_SIZE else None
    if key.endswith(CLASS):
        return str(value).rpartition(".")[2]
    short = _shortest(key)
    name = key if last[short] > 1 else short
    if isinstance(value, bool):
        return name if value else None
    return f"{name}={_word(value)}"


def _shortest(key: str) -> str:
    return key.rpartition(".")[2]


def _word(value: object) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    return value[:SHOWN] if CHECKSUM.fullmatch(value) else value


def without_data(name: str) -> str:
    """A group's name without the settings that choose the part of the data."""
    return BETWEEN.join(_apart_from_data(name)) or ALL


def _apart_from_data(name: str) -> list[str]:
    words = [_shortest(key) for key in DATA_SIZE]
    return [part for part in name.split(BETWEEN) if _shortest(part.partition("=")[0]) not in words]
