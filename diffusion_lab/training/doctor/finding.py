"""The findings of checks, and a decorator for the parts of a run, which may be missing."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch

from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.sentences import MISTAKES, sentence

Part = TypeVar("Part")


class Status(StrEnum):
    """The gravity of a finding."""

    OK = "ok"
    ADVICE = "advice"
    WARNING = "warning"
    ERROR = "error"
    SKIPPED = "skipped"


# a status and a sentence; a check without a remark has found nothing wrong
Remark = tuple[Status, str]


@dataclass(frozen=True)
class Finding:
    """The result of a check: its name, a status, and a message that says what to write instead."""

    name: str
    status: Status
    message: str = ""


class Missing(Exception):
    """Raised for a part of a run that is missing because it was refused or is not measured."""


def part(refusal: str) -> Callable[[Callable[[Any], Part]], cached_property[Part]]:
    """Decorates a part of a planned run: a property that is made once.

    If the part cannot be made, the run's `refusals[refusal]` says why, and asking for the part, or
    for one that is made from it, raises Missing.
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
                    "a training step does not fit into the device's memory; write a smaller "
                    "micro_batch_size, or wait until the device is free"
                )
            raise Missing

        return cached_property(made)

    return decorate


def advice(message: str) -> Remark:
    """Makes a remark on something that could be better."""
    return Status.ADVICE, message


def warning(message: str) -> Remark:
    """Makes a remark on something that spoils results."""
    return Status.WARNING, message


def error(message: str) -> Remark:
    """Makes a remark on something that makes a run fail, or worthless."""
    return Status.ERROR, message
