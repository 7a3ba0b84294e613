"""Errors that are the user's to mend: the command line prints their one sentence and no trace."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException


class UserError(ValueError):
    """Something asked for is wrong; the message says what, and what to write instead."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turns what a constructor says of its arguments into a `UserError`.

    For the stage where a configuration becomes objects; a ValueError after it is a defect.
    """
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise UserError(str(cause)) from error
        if isinstance(cause, TypeError) and (key := re.search(r"full_key: (\S+)", str(error))):
            raise UserError(f"the values of {key[1]} do not fit: {cause}") from error
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
