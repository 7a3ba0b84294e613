"""Configurations as plain settings under dotted names, and which of them mean what."""

import inspect
from functools import cache

from hydra.utils import get_object

CLASS = "_target_"
FRACTION = "data.fraction"
DATA_SIZE = (FRACTION, "data.per_class")
SUBSET_SEED = "data.subset_seed"
# what makes a held-out loss the quantity that it is, apart from what is only trained with
OF_THE_LOSS = ("objective.", "schedule.", "first_stage.", "data.")
NOT_OF_THE_LOSS = (*DATA_SIZE, SUBSET_SEED, "data.flip")
PLAIN = (bool, int, float, str)
Settings = dict[str, object]  # dotted key -> plain value


def flat(plain: object, name: str = "") -> dict[str, object]:
    """Nested plain values by their dotted names; one that is empty is a value itself."""
    if not isinstance(plain, dict) or (name and not plain):
        return {name: plain}
    return {
        key: value
        for part, inner in plain.items()
        for key, value in flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def below(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a key is one of those or lies in it."""
    return f"{key}.".startswith(tuple(f"{each}." for each in keys))


def with_defaults(plain: object) -> object:
    """A configuration with the constructors' defaults of keys that a run is older than."""
    if not isinstance(plain, dict):
        return plain
    filled = {key: with_defaults(value) for key, value in plain.items()}
    return defaults_of(str(plain[CLASS])) | filled if CLASS in plain else filled


@cache
def defaults_of(target: str) -> Settings:
    """The plain defaults of a class by its name, none if it is not here."""
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except Exception:  # somebody's network, whose file may do anything when it is imported
        return {}
    return {each.name: each.default for each in parameters if isinstance(each.default, PLAIN)}
