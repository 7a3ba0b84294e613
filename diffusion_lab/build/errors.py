"""What Hydra says of objects that cannot be built, as one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.common.errors import UserError, is_whole, require


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


def require_whole_numbers(cfg: DictConfig, least: dict[str, int]) -> None:
    """Raises UserError unless each named key holds a whole number of at least so much."""
    for key, minimum in least.items():
        value = OmegaConf.select(cfg, key)
        require(is_whole(value, minimum), key, value, f"a whole number of at least {minimum}")
