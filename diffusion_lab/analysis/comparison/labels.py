"""Names of compositions: the fewest settings that tell them apart."""

import json
from collections import Counter

from diffusion_lab.build.config_keys import CLASS, DATA_SIZE, Settings

BETWEEN = " \N{MIDDLE DOT} "  # the settings in a name
ALL = "all runs"


def varying(settings: list[Settings]) -> list[str]:
    """The keys whose values are not all one, classes first, then what lies higher."""
    keys = {key for each in settings for key in each}
    found = [key for key in keys if len({_word(each.get(key)) for each in settings}) > 1]
    return sorted(found, key=lambda key: (not key.endswith(CLASS), key.count("."), key))


def names_of(settings: list[Settings], keys: list[str]) -> list[str]:
    """A name for each of the settings, made of the first of `keys` that tell all apart."""
    chosen: list[str] = []
    told_apart = 1
    for key in keys:
        parts = {tuple(_word(each.get(k)) for k in [*chosen, key]) for each in settings}
        if len(parts) > told_apart:
            told_apart = len(parts)
            chosen.append(key)
    last = Counter(_shortest(key) for key in chosen)
    names = [
        BETWEEN.join(filter(None, (part(key, each, last) for key in chosen))) for each in settings
    ]
    # apart from the part of the data, too, each must be named, unless that is all that differs
    nameless = sum(not _apart_from_data(name) for name in names)
    if len(set(names)) < len(names) or not all(names) or 0 < nameless < len(names):
        long = [
            BETWEEN.join(f"{key}={_word(each.get(key))}" for key in chosen) for each in settings
        ]
        return long if chosen else [ALL]
    return names


def part(key: str, settings: Settings, last: Counter) -> str | None:
    """What a key adds to a name: the class, or the last part of the key and its value."""
    value = settings.get(key)
    if value is None:
        return f"{_shortest(key)}=null" if key in DATA_SIZE else None
    if key.endswith(CLASS):
        return str(value).rpartition(".")[2]
    short = _shortest(key)
    return f"{key if last[short] > 1 else short}={_word(value)}"


def _shortest(key: str) -> str:
    return key.rpartition(".")[2]


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def without_data(name: str) -> str:
    """A name without what it says of the part of the data."""
    return BETWEEN.join(_apart_from_data(name)) or ALL


def _apart_from_data(name: str) -> list[str]:
    words = [_shortest(key) for key in DATA_SIZE]
    return [part for part in name.split(BETWEEN) if _shortest(part.partition("=")[0]) not in words]
