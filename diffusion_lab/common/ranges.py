"""Ranges of arguments, declared above a signature: `@ranges(steps=whole(1), eta=above(0))`."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

Target = TypeVar("Target", bound=Callable[..., Any])
Settings = TypeVar("Settings")


class RangeError(ValueError):
    """The error for a value of `argument` that is not `wanted`; `example` is a valid value."""

    def __init__(self, argument: str, value: object, wanted: str, example: object = None):
        super().__init__(f"{argument} must be {wanted}, got {written(value)}")
        self.argument, self.value, self.wanted, self.example = argument, value, wanted, example

    def of(self, key: str) -> str:
        """The sentence about the configuration key `key`, which holds the value."""
        as_in = "" if self.example is None else f", as in {key}={written(self.example)}"
        return f"{key}={written(self.value)} must be {self.wanted}{as_in}"


@dataclass(frozen=True)
class Range:
    """The values for which `allows` is true; error messages describe them as `wanted`."""

    wanted: str
    allows: Callable[[Any], bool]
    example: object = None

    def as_in(self, example: object) -> "Range":
        """Returns this range with an example, which ends its error message."""
        return replace(self, example=example)

    def check(self, argument: str, value: object) -> None:
        """Raises RangeError unless the value is in the range."""
        if not self.allows(value):
            raise RangeError(argument, value, self.wanted, self.example)


def declared(target: Callable[..., Any]) -> dict[str, Range]:
    """The ranges in the types of the arguments of a function or a class, by argument."""
    parameters = inspect.signature(target).parameters.items()
    found = {name: getattr(each.annotation, "__metadata__", ()) for name, each in parameters}
    return {name: metadata[0] for name, metadata in found.items() if metadata}


def ranges(**allowed: Range) -> Callable[[Target], Target]:
    """Decorates a constructor, a function or a dataclass, which then checks these arguments.

    An argument's range may also be part of its type, as in Annotated[int, whole(1)].
    """

    def decorate(target: Target) -> Target:
        if isinstance(target, type):
            target.__init__ = decorate(target.__init__)  # type: ignore[misc]
            return target
        signature = inspect.signature(target)
        for name, each in declared(target).items():
            allowed.setdefault(name, each)
        if unknown := allowed.keys() - signature.parameters.keys():
            raise TypeError(f"{target.__qualname__} has no argument {', '.join(unknown)}")

        @wraps(target)
        def checked(*args: Any, **named: Any) -> Any:
            try:
                bound = signature.bind(*args, **named)
            except TypeError:
                return target(*args, **named)  # Python's own error names the argument
            bound.apply_defaults()
            for argument, allowed_range in allowed.items():
                allowed_range.check(argument, bound.arguments[argument])
            return target(*args, **named)

        return cast(Target, checked)

    return decorate


@dataclass_transform()
def settings(target: type[Settings]) -> type[Settings]:
    """Makes a class a dataclass that checks its fields' ranges; an object equals only itself."""
    return ranges()(dataclass(eq=False, repr=False)(target))


def whole(least: int, most: int | None = None) -> Range:
    """The whole numbers from `least`, up to `most` if it is given; true and false are excluded."""
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    return Range(
        f"a whole number {span}",
        lambda value: type(value) is int and least <= value and (most is None or value <= most),
    )


def number(limits: str = "", inside: Callable[[float], bool] = lambda value: True) -> Range:
    """The finite numbers for which `inside` is true; true and false are excluded."""
    return Range(
        f"a number {limits}".rstrip(),
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and inside(value)
        ),
    )


def at_least(least: float) -> Range:
    """The numbers of at least `least`."""
    return number(f"of at least {least:g}", lambda value: value >= least)


def above(limit: float) -> Range:
    """The numbers above `limit`."""
    return number(f"above {limit:g}", lambda value: value > limit)


def between(low: float, high: float) -> Range:
    """The numbers from `low` to `high`, both included."""
    return number(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


def inside(low: float, high: float) -> Range:
    """The numbers above `low` and below `high`."""
    return number(f"above {low:g} and below {high:g}", lambda value: low < value < high)


def share() -> Range:
    """The numbers above 0 and at most 1."""
    return number("above 0 and at most 1", lambda value: 0 < value <= 1)


def flag() -> Range:
    """The values True and False."""
    return Range("true or false", lambda value: isinstance(value, bool))


def one_of(*options: object) -> Range:
    """The values in `options`."""
    names = ", ".join(map(str, options))
    return Range(f"one of {names}", lambda value: any(value is o or value == o for o in options))


def whole_list(least: int, shortest: int = 0) -> Range:
    """The lists of at least `shortest` whole numbers, each of at least `least`."""
    item = whole(least)
    return numbers(
        f"a list of {f'{shortest} or more ' if shortest else ''}whole numbers of at least {least}",
        lambda value: len(value) >= shortest and all(map(item.allows, value)),
    )


def numbers(wanted: str, inside: Callable[[Sequence[float]], bool]) -> Range:
    """The lists of numbers, infinite ones included, for which `inside` is true."""

    def allows(value: Any) -> bool:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and all(type(each) in (int, float) for each in value) and inside(value)

    return Range(wanted, allows)


def either(first: Range, second: Range) -> Range:
    """The values that are in at least one of two ranges."""
    return Range(
        f"{first.wanted} or {second.wanted}",
        lambda value: first.allows(value) or second.allows(value),
        first.example,
    )


def optional(allowed: Range) -> Range:
    """The values of a range, and None."""
    return either(allowed, Range("null", lambda value: value is None))


MULTIPLE_OF_4 = Range(
    "a multiple of 4 above 0", lambda value: whole(4).allows(value) and value % 4 == 0, 32
)
AUTO = Range("auto, true or false", lambda value: isinstance(value, bool) or value == "auto")
BETAS = numbers(
    "a list of two numbers from 0 to below 1",
    lambda value: len(value) == 2 and all(0 <= each < 1 for each in value),
).as_in([0.9, 0.999])
FOLDER = Range(
    "the name of a folder in outputs",
    lambda value: (
        isinstance(value, str)
        and bool(parts := (path := Path(value)).parts)
        and not (path.is_absolute() or ".." in parts)
    ),
    "mine",
)
IMAGE_SHAPE = numbers(
    "[channels,height,width]", lambda value: len(value) == 3 and whole_list(1).allows(value)
)
Count = Annotated[int, whole(1)]
Flag = Annotated[bool, flag()]
Fraction = Annotated[float, between(0, 1)]
Number = Annotated[float, number()]
PATH = Range("a path", lambda value: isinstance(value, str))
Positive = Annotated[float, above(0)]
Seed = Annotated[int, whole(0)]


def written(value: object) -> object:
    """A value as written on the command line; text is in quotes, since '32' is not a number."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) else value
