"""Time samplers: the noise levels of a training batch."""

from diffusion_lab.diffusion.objective.time_sampler.base import (
    WHOLE_BATCH,
    BatchShare,
    Gather,
    TimeSampler,
)
from diffusion_lab.diffusion.objective.time_sampler.distributions import (
    CosineInterpolated,
    LogitNormal,
    LogNormal,
    UniformTime,
)
from diffusion_lab.diffusion.objective.time_sampler.second_moment import SecondMoment
