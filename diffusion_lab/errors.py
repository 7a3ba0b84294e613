"""Errors that are the user's to mend: the command line prints their one sentence and no trace."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf


class UserError(ValueError):
    """Something asked for is wrong; the message says what, and what to write instead."""


class Stopped(Exception):
    """Training cannot go on, on no rank; the message says why. Whoever trains adds what to do."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turns what a constructor says of its arguments into a `UserError`.

    For the stage where a configuration becomes objects; a ValueError after it is a defect.
    """
    try:
        yield
    except InstantiationException as error:
        key = re.search(r"full_key: (\S+)", str(error))
        place = key[1] if key else "the configuration"
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise UserError(str(cause)) from error
        reason = " ".join(str(cause).split())
        if "unexpected keyword" in reason or "takes no arguments" in reason:
            reason += "; leave out what it does not take, also where an experiment sets it"
        raise UserError(f"the values of {place} do not fit: {reason}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    except TypeError as error:  # of a factory, called with what the configuration says
        raise UserError(f"a value of the configuration does not fit: {error}") from error


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


def require_whole_numbers(cfg: DictConfig, least: dict[str, int]) -> None:
    """Raises UserError unless each named key holds a whole number of at least so much."""
    for key, minimum in least.items():
        value = OmegaConf.select(cfg, key)
        require(is_whole(value, minimum), key, value, f"a whole number of at least {minimum}")


def _written(value: object) -> object:
    """A value as a command line has it; a text in quotes, for '32' is no number."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) else value
