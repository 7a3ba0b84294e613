"""The summary of a run, summary.json: how it was trained, what it cost, and what was measured."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusion_lab.common.files import read_json
from diffusion_lab.runs import files, migrate
from diffusion_lab.runs.files import SUMMARY

PASSES = 3  # a step of training costs 3 forward passes, as the backward pass costs about 2


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Facts about a run; None stands for what is not known, or was not measured."""

    name: str | None = None
    finished: bool = False
    pruned: bool = False
    ended_by: str | None = None  # the callback that ended training before its last step
    steps: int = 0
    images_seen: int | None = None
    began_from_images: int | None = None  # behind the weights that it starts from
    began_from_flops: float | None = None
    first_stage_seconds: float | None = None  # of its training
    skipped_steps: int = 0
    wall_seconds: float | None = None
    training_seconds: float | None = None
    sampling_seconds: float | None = None  # of a sample
    parameters: int | None = None
    precision: str | None = None
    matmul_precision: str | None = None
    convolutions_in_tf32: bool | None = None
    ranks: int | None = None
    training_images: int | None = None
    validation_images: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None  # of the metrics of samples
    sampling: dict[str, Any] | None = None
    at_other_steps: list[dict[str, Any]] = field(default_factory=list)
    extra_quantities: list[dict[str, Any]] = field(default_factory=list)
    macs: int | None = None  # multiply-accumulates of a network call on one image
    peak_memory_bytes: int | None = None
    jumps: bool | None = None  # whether the network is told of two noise levels
    forward_passes: float | None = None  # that a step costs
    teacher_images: int | None = 0  # 0 without a teacher
    teacher_calls: int | None = 0
    teacher_macs: int | None = 0
    device: str | None = None
    processor: str | None = None
    threads: int | None = None
    python: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    overrides: list[str] | None = None  # of the command that began it
    ended_at: str | None = None  # UTC
    images: int | None = None  # that another program drew
    labelled: bool | None = None

    def flops(self, images: float | None) -> float | None:
        """FLOPs of training on `images` images, forward and backward; None if not known."""
        if self.forward_passes is None or self.macs is None or images is None:
            return None
        return 2 * self.forward_passes * self.macs * images

    @property
    def teaching_flops(self) -> float | None:
        """The FLOPs of the training and of the calls of a teacher; None if not known."""
        images, calls, macs = self.teacher_images, self.teacher_calls, self.teacher_macs
        if images is None or calls is None or macs is None:
            return None
        return 2 * macs * (PASSES * images + calls)

    def images_behind(self, anew: bool) -> int | None:
        """The images of a run, its teacher, and before it unless `anew`; None if unknown."""
        if not self.images_seen:
            return None
        before = 0 if anew else self.began_from_images or 0
        return self.images_seen + (self.teacher_images or 0) + before

    def flops_behind(self, anew: bool) -> float | None:
        """The FLOPs of a run, its teacher, and before it unless `anew`; None if unknown."""
        own, teaching = self.flops(self.images_seen), self.teaching_flops
        before = 0.0 if anew else self.began_from_flops
        return None if not own or teaching is None or before is None else own + teaching + before


def load_summary(folder: str | Path) -> Summary:
    """The summary of a run; one that knows nothing if it is missing or damaged."""
    found = read_json(Path(folder) / SUMMARY)
    known = migrate.summary(found) if found and files.is_record(found) else {}
    names = {each.name for each in fields(Summary)}  # other versions may have others
    return Summary(**{key: value for key, value in known.items() if key in names})
