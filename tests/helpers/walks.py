"""Four schedules to test walks of samplers on, and noise that is the same each time."""

from collections.abc import Callable

import pytest
from torch import Tensor

from diffusion_lab.diffusion.schedule import Cosine, DDPMLinear, Rectified, VarianceExploding

SCHEDULES = [Rectified(), Cosine(), DDPMLinear(), VarianceExploding()]


def by_type(argument: str, values: list) -> pytest.MarkDecorator:
    """Runs a test with each value, named by its type."""
    return pytest.mark.parametrize(argument, values, ids=lambda value: type(value).__name__)


every_schedule = by_type("schedule", SCHEDULES)


def replayed(draws: Tensor | list[Tensor]) -> Callable[..., Tensor]:
    """A `randn_like` that returns one draw after the other, whatever it is asked for."""
    fresh = iter(draws)
    return lambda *_: next(fresh)
