"""Trained models from which other models learn, and the rules that they bring."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from diffusion_lab.common.ranges import PATH, Count, Seed, at_least, optional, settings, whole
from diffusion_lab.common.rules import Rules
from diffusion_lab.diffusion.estimate import DenoiseFn


@settings
class TeacherPairs:
    """Pairs of unit noise and the sample that the run in `run` draws from it (arXiv:2209.03003).

    A model that is trained on them instead of images with fresh noise has straighter paths. The
    run's own sampler and guidance draw them, with `steps` and `scale` in place of theirs if given.
    `sha256` is of the run's weights. A model that has been trained needs no pairs and no teacher.
    """

    asked: ClassVar[Literal[False]] = False  # whether the model itself is asked in each step
    rules: ClassVar[Rules] = {
        ".run={teacher.run} chooses the noise of each sample, which objective.offset_noise would "
        "change; write objective.offset_noise=0": lambda teacher, offset_noise: offset_noise,
        ".run={teacher.run} draws the images, so none are changed; write augmentation=none": (
            lambda teacher, augmentation: augmentation is not None
        ),
        ".run={teacher.run} draws the images, and none of the data's are trained on; leave out "
        "data.{part}, or write objective.teacher.count for fewer pairs": (
            lambda teacher, part: part is not None
        ),
    }

    run: Annotated[str, PATH]
    sha256: str | None
    count: Count
    steps: Annotated[int | None, optional(whole(1))]
    scale: Annotated[float | None, optional(at_least(0))]
    seed: Seed
    cache_dir: Annotated[str, PATH]


@settings
class TeacherModel:
    """The model of the run in `run`, which is asked during training.

    `scale` replaces its guidance's, and `sha256` is of its weights. It is no part of what is saved
    or averaged, and a model that has been trained does not need it.
    """

    asked: ClassVar[Literal[True]] = True
    rules: ClassVar[Rules] = {
        ".run={teacher.run} is not told how an image was augmented; write augmentation=none": (
            lambda teacher, augmentation: augmentation is not None
        ),
        ".run={teacher.run} answers with samples, and a student follows the mean of samples; give "
        "the run that it was trained from, or another with objective=edm": (
            lambda teacher, its_loss: its_loss.of_samples
        ),
        ".run={teacher.run} knows other noise levels than this run's; train with its schedule": (
            lambda teacher, same_levels: not same_levels
        ),
        ".run={teacher.run} is guided by CFG++, which Heun's steps of a student cannot follow; "
        "give a run that samples with another guidance": (
            lambda teacher, its_guidance: its_guidance.keeps_weak_noise
        ),
    }

    run: Annotated[str, PATH]
    sha256: str | None
    scale: Annotated[float | None, optional(at_least(0))]

    def __post_init__(self) -> None:
        self._bind: Callable[[Tensor | None], DenoiseFn] | None = None

    def __deepcopy__(self, memo: dict) -> "TeacherModel":
        return self  # frozen, so that copies of the student, such as averaged weights, can share it

    def open(self, bind: Callable[[Tensor | None], DenoiseFn]) -> None:
        """Sets the function that binds the model to labels (B,) or None."""
        self._bind = bind

    @property
    def opened(self) -> bool:
        """Whether there is a model that can be asked."""
        return self._bind is not None

    def bound(self, labels: Tensor | None) -> DenoiseFn:
        """The function that denoises images with these labels (B,) or None."""
        assert self._bind is not None, "a run opens its teacher before it trains"
        return self._bind(labels)
