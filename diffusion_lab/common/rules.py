"""A table of what cannot be combined: a row is a sentence, and the condition of its being said.

    "objective/teacher chooses the noise of each sample, which a coupling would exchange; write "
    "coupling=none": lambda teacher, coupling: teacher and coupling

The arguments of a condition name the parts that it looks at; a row that looks at an absent part
does not apply. Sentences may show parts, as in {loss.guidance}. A part brings rows of its own in
the attribute `rules`, to which those of a subclass are added. Their sentences go on after the
part's option, as in objective/loss=mean_flow, or, if they begin with a dot, after its key.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusion_lab.common.messages import UserError

Rules = Mapping[str, Callable[..., Any]]
_collections: list[list[str]] = []  # of the blocks that collect sentences


def sentences(
    table: Rules, keys: Mapping[str, str], attribute: str = "rules", /, **parts: Any
) -> Iterator[str]:
    """The sentence of each row that holds for these parts: of the table, then those they bring.

    `keys` are the configuration keys of parts whose key is not their name.
    """
    rows = list(table.items())
    for name, part in parts.items():
        key = keys.get(name, name)
        for kind in reversed(type(part).__mro__):
            for text, holds in vars(kind).get(attribute, {}).items():
                subject = key if text[0] == "." else f"{key.replace('.', '/')}={option(part)} "
                rows.append((subject + text, holds))
    for text, holds in rows:
        names = inspect.signature(holds).parameters.keys()
        if names <= parts.keys() and holds(**{name: parts[name] for name in names}):
            yield text.format_map(parts)


def check(table: Rules, keys: Mapping[str, str], /, **parts: Any) -> None:
    """Raises UserError with the sentence of the first row that holds for the parts, if any."""
    found = sentences(table, keys, **parts)
    if _collections:
        _collections[-1].extend(found)
    elif sentence := next(found, None):
        raise UserError(sentence)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collects the sentences of all rows that hold, of all tables that are checked in the block.

    Parts that break a rule may fail in other ways when they are put together, which says nothing
    more: such errors are dropped.
    """
    broken: list[str] = []
    _collections.append(broken)
    try:
        yield broken
    except Exception:
        if not broken:
            raise
    finally:
        _collections.pop()


def option(part: object) -> str:
    """The name of a part among the options of its group: mean_flow for a MeanFlow."""
    return re.sub(r"(?<=[A-Za-z])(?=[A-Z][a-z])", "_", type(part).__name__).lower()
