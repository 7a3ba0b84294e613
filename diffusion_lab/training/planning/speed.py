"""The time of a run by a roofline: FLOPs over peak, bytes over bandwidth, whichever takes longer.

`mfu`, the share of the peak that matrix products reach, and `link_share`, that of the links, are
guesses. DDP sends gradients during the backward pass, two thirds of a step's compute, and FSDP
gathers and sends during both passes: only what takes longer than that is waited for.
"""

from dataclasses import dataclass

from diffusion_lab.diffusion.objective.objective import SELF_CONDITIONED
from diffusion_lab.training.callbacks.periodic import times
from diffusion_lab.training.planning.memory import RankMemory
from diffusion_lab.training.planning.run_elsewhere import RunElsewhere
from diffusion_lab.training.trainer import steps_in_time

BACKWARD = 2 / 3  # of the time of both passes


@dataclass(frozen=True)
class Step:
    """The seconds of a training step: of products, of memory, of the update, and of sending."""

    compute: float  # FLOPs of all passes
    encoding: float  # FLOPs of a first stage whose latents are not cached
    activations: float  # activations, written once and read once
    update: float  # weights, gradients, optimiser state and averages, read and written
    communication: float  # a ring over all GPUs
    waiting: float  # the part of communication that nothing hides

    @property
    def seconds(self) -> float:
        """The seconds of the step."""
        longer = max(self.compute, self.activations)
        return longer + self.encoding + self.update + self.waiting


@dataclass(frozen=True)
class Duration:
    """The steps of a run that its time limit allows, and the seconds of all it does.

    `sampling` is None if the sampler's number of network calls is not known.
    """

    steps: int
    training: float
    validation: float
    sampling: float | None  # of samples for metrics and of grids, without decoding and features

    @property
    def seconds(self) -> float:
        """The seconds of what is known."""
        return self.training + self.validation + (self.sampling or 0.0)


def passes(run: RunElsewhere) -> float:
    """The forward passes that cost as much as a training step."""
    return run.activations.passes + SELF_CONDITIONED * run.cfg.denoiser.self_conditioning


def flops_per_second(run: RunElsewhere) -> float:
    """The FLOP/s that a GPU is guessed to reach."""
    return run.cfg.mfu * run.gpu.peak(run.precision)


def step_of(run: RunElsewhere, memory: RankMemory) -> Step:
    """The time of a training step."""
    accumulate, images = run.batch.accumulate, run.batch.accumulate * run.batch.micro_batch
    compute = images * passes(run) * 2 * run.macs / flops_per_second(run)
    encoding = images * run.encoding_flops / (run.cfg.mfu * run.gpu.float32_flops)
    kept = 2 * accumulate * memory.activations / run.gpu.bandwidth
    state = 2 * (memory.parameters + memory.optimizer + memory.averages)
    # gradients are clipped before they are used, and each average reads the weights
    moved = state + 3 * memory.gradients + memory.averages
    communication = sent_bytes(run) / (run.cfg.link_share * run.gpu.bus(run.devices, run.nodes))
    hides = max(compute, kept) * (1 if run.sharded else BACKWARD / accumulate)
    return Step(
        compute,
        encoding,
        kept,
        moved / run.gpu.bandwidth,
        communication,
        max(0.0, communication - hides),
    )


def sent_bytes(run: RunElsewhere) -> float:
    """The bytes that each GPU of a ring sends in a step.

    An all-reduce sends every number twice; FSDP gathers parameters for both passes and scatters
    gradients, for each micro-batch.
    """
    size = sum(each.nbytes for each in run.task.module.trained_parameters())
    rounds = 3 * run.batch.accumulate if run.sharded else 2
    return rounds * size * (run.world - 1) / run.world


def duration_of(run: RunElsewhere, step: Step) -> Duration:
    """The time of a whole run, or of what its time limit allows."""
    whole = duration(run, step, run.steps)
    counted = whole.training + whole.validation  # metrics and grids stop the clock
    allowed = steps_in_time(run.cfg.trainer.max_time, run.steps, counted)
    return whole if allowed == run.steps else duration(run, step, allowed)


def duration(run: RunElsewhere, step: Step, steps: int) -> Duration:
    """The time of a run of `steps` steps."""
    call = 2 * run.macs / flops_per_second(run) / run.world  # seconds of a network call
    validations = times(steps, run.cfg.validate_every_n_steps)
    drawn = run.task.measured_images(steps) + run.task.grid_images(steps)
    return Duration(
        steps,
        steps * step.seconds,
        validations * run.cfg.data.validate_on * call,
        None if run.calls is None else drawn * run.calls * call,
    )
