"""Overrides of commands on trained runs, those with several values, as in steps=5,10, and paths."""

from itertools import product
from pathlib import Path

from diffusion_lab.build.overrides import parse

# groups whose option is the run's own, which Hydra does not see, unless another is chosen
OF_THE_RUN = ("sampler.", "guidance.", "metrics.")

# Hydra's flags that say where configurations are, and not what to do
PLACES = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")
# and all that take the next argument
WITH_A_VALUE = (*PLACES, "--cfg", "-c", "--package", "-p", "--info", "-i")


def admit(override: str, groups: tuple[str, ...] = OF_THE_RUN) -> str:
    """The override, made one that may name a key of the run's own choice in one of the groups.

    A key that is none is then refused by the class that it is given to.
    """
    return f"++{override}" if override.startswith(groups) else override


def gather(arguments: list[str]) -> list[str]:
    """The arguments, those with several values moved into one: combinations=[...].

    Raises Hydra's OverrideParseException for what is no override.
    """
    single, several = [], []
    for argument in arguments:
        flag = argument.startswith("-")
        varies = not flag and parse([argument])[0].is_sweep_override()
        (several if varies else single).append(argument)
    if not several:
        return single
    return [*single, f"combinations={_quoted(several)}"]


def gather_paths(arguments: list[str]) -> list[str]:
    """The arguments, those that are no override moved into one: paths=[...]."""
    paths, rest, value = [], [], False
    for argument in arguments:
        named = value or argument.startswith("-")
        path = not named and ("=" not in argument or Path(argument).exists())
        (paths if path else rest).append(argument)
        value = argument in WITH_A_VALUE
    return [*rest, f"paths={_quoted(paths)}"] if paths else rest


def _quoted(words: list[str]) -> str:
    """A list of strings, as Hydra reads it."""
    quoted = ("'" + word.replace("'", "\\'") + "'" for word in words)
    return f"[{','.join(quoted)}]"


def expand(several: list[str]) -> list[dict[str, str]]:
    """Every combination of the values, the last key changing fastest; {} where nothing varies."""
    parsed = parse(several)
    keys = [override.key_or_group for override in parsed]
    values = [list(override.sweep_string_iterator()) for override in parsed]
    return [dict(zip(keys, chosen, strict=True)) for chosen in product(*values)]
