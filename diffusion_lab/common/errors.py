"""Errors that are the user's to mend: the command line prints their one sentence and no trace."""

import math


class UserError(ValueError):
    """Something asked for is wrong; the message says what, and what to write instead."""


class TrainingStopped(Exception):
    """Training cannot go on, on no rank; the message says why. Whoever trains adds what to do."""


def require(right: bool, key: str, value: object, wanted: str, example: object = None) -> None:
    """Raises UserError, "key=value must be `wanted`", unless the value is `right`.

    `example`, if there is one, is what to write instead.
    """
    if not right:
        as_in = "" if example is None else f", as in {key}={example}"
        raise UserError(f"{key}={_written(value)} must be {wanted}{as_in}")


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number of at least so much; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _written(value: object) -> object:
    """A value as a command line has it; a text in quotes, for '32' is no number."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) else value
