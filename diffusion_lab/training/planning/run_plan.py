"""A plan: a run on GPUs that are not here, and what it takes of them."""

from dataclasses import asdict, dataclass

from diffusion_lab.backbone.macs import TRAINING_PASSES
from diffusion_lab.training.planning.disk import Disk
from diffusion_lab.training.planning.memory import RankMemory
from diffusion_lab.training.planning.run_elsewhere import RunElsewhere
from diffusion_lab.training.planning.speed import Duration, Step

GUESSES = ("mfu", "link_share", "reserve")
MOST_IMAGES = 2**20  # in a micro-batch


@dataclass(frozen=True)
class RunPlan:
    """A run on GPUs that are not here, and what it takes of them."""

    name: str
    run: RunElsewhere
    memory: RankMemory
    step: Step
    duration: Duration
    disk: Disk

    @property
    def usable(self) -> float:
        """The bytes of a GPU without the reserve."""
        return (1 - self.run.cfg.reserve) * self.run.gpu.memory

    @property
    def parameters(self) -> int:
        """The number of the network's parameters."""
        return sum(each.numel() for each in self.run.task.module.network.parameters())

    @property
    def guesses(self) -> dict[str, float]:
        """The settings that are guesses."""
        return {key: self.run.cfg[key] for key in GUESSES}

    @property
    def fits(self) -> bool:
        """Whether a micro-batch fits into a GPU."""
        return self.memory.total <= self.usable

    @property
    def largest_micro_batch(self) -> int:
        """The most images that fit into a GPU at once."""
        rest = self.usable - (self.memory.total - self.memory.activations)
        low, high = 0, MOST_IMAGES
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.run.activations.of(middle) <= rest
            low, high = (middle, high) if fits else (low, middle)
        return low

    @property
    def fitting(self) -> int:
        """The largest micro-batch that fits and divides a GPU's share of the batch; 0 if none."""
        share = self.run.batch.micro_batch * self.run.batch.accumulate
        most = min(share, self.largest_micro_batch)
        return next((n for n in range(most, 0, -1) if share % n == 0), 0)

    @property
    def images_per_second(self) -> float:
        """Training images per second on all GPUs."""
        return self.run.batch.batch_size / self.step.seconds

    @property
    def share_of_peak(self) -> float:
        """The model's FLOPs per second over the peak of all GPUs, without recomputed ones."""
        flops = TRAINING_PASSES * 2 * self.run.macs * self.images_per_second
        return flops / (self.run.world * self.run.gpu.peak(self.run.precision))

    @property
    def images_seen(self) -> int:
        """The training images that the run sees."""
        return self.duration.steps * self.run.batch.batch_size

    def as_dict(self) -> dict[str, object]:
        """All numbers as plain values."""
        run, memory = self.run, self.memory
        return {
            "name": self.name,
            "gpu": vars(run.gpu),
            "nodes": run.nodes,
            "devices": run.devices,
            "strategy": run.strategy,
            "precision": run.precision,
            "parameters": self.parameters,
            "macs": run.macs,
            **asdict(run.batch),
            "memory": asdict(memory) | {"total": memory.total, "usable": self.usable},
            "activation_bytes": run.activations.of(2) - run.activations.of(1),
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "step": asdict(self.step) | {"seconds": self.step.seconds},
            "images_per_second": self.images_per_second,
            "share_of_peak": self.share_of_peak,
            "images_seen": self.images_seen,
            "duration": asdict(self.duration) | {"seconds": self.duration.seconds},
            "disk": asdict(self.disk),
            "guesses": self.guesses,
        }
