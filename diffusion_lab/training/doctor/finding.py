"""The findings of checks, each a sentence and how much it matters, and what a check cannot see."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch

from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.sentences import MISTAKES, sentence

OK, ADVICE, WARNING, ERROR, SKIPPED = "ok", "advice", "warning", "error", "skipped"
Part = TypeVar("Part")
# a check yields a status and a sentence; nothing means that all is well
Remark = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """`name` is the check's; a message says what to write instead."""

    name: str
    status: str
    message: str = ""


class Missing(Exception):
    """A part of a run is not there: it was refused, or is not measured."""


def part(refusal: str) -> Callable[[Callable[[Any], Part]], cached_property[Part]]:
    """Decorates a part of a planned run: a property that is made once.

    What refuses it becomes the sentence `refusals[refusal]` of the run; whoever asks for such a
    part, or for one that is made of it, gets Missing.
    """

    def decorate(make: Callable[[Any], Part]) -> cached_property[Part]:
        @wraps(make)
        def made(run: Any) -> Part:
            if refusal in run.refusals:
                raise Missing
            try:
                with errors_at(run.cfg, ""):
                    return make(run)
            except MISTAKES as error:
                run.refusals[refusal] = sentence(error)
            except torch.OutOfMemoryError:
                run.refusals[refusal] = (
                    "a few steps do not fit into the device's memory; write a smaller "
                    "micro_batch_size, or wait until the device is free"
                )
            raise Missing

        return cached_property(made)

    return decorate


def advice(message: str) -> Remark:
    """A finding that could be better."""
    return ADVICE, message


def warning(message: str) -> Remark:
    """A finding that spoils results."""
    return WARNING, message


def error(message: str) -> Remark:
    """A finding with which a run fails, or is worth nothing."""
    return ERROR, message
