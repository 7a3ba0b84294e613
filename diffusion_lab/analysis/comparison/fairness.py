"""Fairness of a comparison: whether images, time, operations and machines of runs are equal."""

from collections.abc import Iterator, Sequence

from lightning.pytorch.callbacks import Timer
from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.curves import training_flops
from diffusion_lab.analysis.comparison.groups import Group, runs_of, trained
from diffusion_lab.build.config_keys import SUBSET_SEED, flattered
from diffusion_lab.common.formats import amount, duration, joined
from diffusion_lab.training.initial_weights import starts_anew, teaching_flops

EQUAL_IMAGES = 0.01  # relative difference, for a last batch more or less
NAMED_MACHINES = 2
DIFFUSERS_DIT, DIFFUSERS_PATCH = "DiTTransformer2DModel", 2  # and its patch, if none is set
EQUAL_COST = 0.05  # relative difference, above the 2 % that budget=macs allows each run


def notes(groups: Sequence[Group]) -> list[str]:
    """Sentences on the images seen and the training time of all runs, and on other images."""
    said = [
        f"{group.name} was drawn by another program, of whose training nothing is known"
        for group in groups
        if group.drawn_elsewhere
    ]
    runs = runs_of(trained(groups))
    if not runs:
        return said
    least, most = span(runs, "images_seen")
    seen = f"{least:,} images" if least == most else f"{least:,} to {most:,} images"
    limits = time_limits(runs)
    if limit := common(limits):
        return [*said, f"Every run had a time limit of {limit:,} seconds and saw {seen}"]
    if named := in_words(limits):
        return [*said, f"Runs had time limits of {named}, and saw {seen}"]
    times = dict.fromkeys(map(duration, span(runs, "training_seconds")))
    return [
        *said,
        f"Every run saw {seen}" if least == most else f"Runs saw {seen}",
        f"Training took {' to '.join(times)} of wall-clock time",
    ]


def reservations(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a sentence on each condition that should have been equal and was not."""
    groups = trained(groups)
    if not groups:
        return
    runs = runs_of(groups)
    limits = time_limits(runs)
    if limit := common(limits):
        least, most = span(runs, "training_seconds")
        if least < (1 - EQUAL_COST) * limit:
            times = " to ".join(dict.fromkeys(f"{seconds:,.0f}" for seconds in (least, most)))
            yield (
                f"Training itself took {times} of the {limit:,} seconds: the limit includes "
                "evaluations and pictures during training"
            )
    elif named := in_words(limits):
        yield f"Time limits are unequal: {named}"
    else:
        yield from unequal_budgets(groups)
    yield from unequal_networks(groups)
    yield from prepared(groups)
    for group in groups:
        if flattered(group.runs[0].config, group.runs[0].config.get("metrics")):
            yield f"{group.name} was aligned to the features that FID compares, which flatters it"
    machines = dict.fromkeys(map(machine, runs))
    if len(machines) > 1:
        unequal = "Time, speed and memory were measured on different machines"
        said = "The time is equal but the machines are not" if limit else unequal
        few = len(machines) <= NAMED_MACHINES
        yield f"{said}: {'; '.join(machines)}" if few else f"{said}, {len(machines)} in all"
    choices = {run.settings.get(SUBSET_SEED) for run in runs}
    several_sizes = len({group.data_size for group in groups}) > 1
    if several_sizes and len(choices) == 1 and None not in choices:
        yield (
            f"All runs use the same choice of training images ({SUBSET_SEED}={choices.pop()}), so "
            "the intervals do not show how much another choice would change"
        )


def unequal_budgets(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a sentence on images or operations of groups that no time limit ended."""
    least, most = span(runs_of(groups), "images_seen")
    images = f"runs saw {amount(least)} to {amount(most)} images"
    per_image = [each for group in groups if (each := training_flops(group, 1))]
    if most > (1 + EQUAL_IMAGES) * least:
        known = [group for group in groups if not unknown_start(group)]
        flops = [spent_flops(run, group) for group in known for run in group.runs]
        spent = [each for each in flops if each is not None]
        if len(known) < 2 or len(spent) < len(flops) or max(spent) > (1 + EQUAL_COST) * min(spent):
            yield f"Budgets are unequal: {images}"
            return
        apart = (
            "; those of some initial weights are not counted" if len(known) < len(groups) else ""
        )
        share = 100 * (max(spent) / min(spent) - 1)
        yield (
            "Images are unequal, but training FLOPs, with those of teachers and of initial "
            f"weights, are equal within {share:.2g} %: {images}{apart}"
        )
    elif per_image and max(per_image) > (1 + EQUAL_COST) * min(per_image):
        yield (
            f"Operations are unequal: compositions take {amount(min(per_image))} to "
            f"{amount(max(per_image))} FLOPs to train on an image, at equal numbers of images"
        )


def spent_flops(run: Run, group: Group) -> float | None:
    """The FLOPs of training a group's run, its teacher, and the weights that it starts from.

    None if they are not known.
    """
    own = training_flops(group, run.summary["images_seen"])
    taught = teaching_flops(run.summary)
    if own is None or taught is None:
        return None
    return own + taught + (run.summary["began_from_flops"] if starts_from_weights(group) else 0)


def unknown_start(group: Group) -> bool:
    """Whether a group's runs start from weights of whose training nothing is known."""
    known = (run.summary.get("began_from_flops") for run in group.runs)
    return starts_from_weights(group) and not all(known)


def starts_from_weights(group: Group) -> bool:
    """Whether a group's runs start from trained weights that are not those of their teacher."""
    return not starts_anew(group.runs[0].config)


def unequal_networks(groups: Sequence[Group]) -> Iterator[str]:
    """Yields sentences on parameters, output layers and precision that differ between groups."""
    parameters = [group.mean("parameters") for group in groups if group.values("parameters")]
    if parameters and max(parameters) > (1 + EQUAL_COST) * min(parameters):
        yield (
            f"Parameters are unequal: compositions have {amount(min(parameters))} to "
            f"{amount(max(parameters))}"
        )
    patches = {writes_by(group.runs[0]) for group in groups}
    if len(patches) > 1:
        sides = sorted(patches, key=str)
        said = " and ".join("single pixels" if s is None else f"{s} x {s} patches" for s in sides)
        yield f"Output layers are unequal: compositions write {said}; compare their seams"
    summaries = [run.summary for run in runs_of(groups)]
    precisions = {str(each["precision"]) for each in summaries if "precision" in each}
    if len(precisions) > 1:
        yield f"Precision is unequal: {' and '.join(sorted(precisions))}"


def prepared(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a sentence on each other network behind a group's runs, and on initial weights."""
    left_out = "which its own images and time leave out"
    for group in groups:
        known, config = group.runs[0].summary, group.runs[0].config
        images, calls = known.get("teacher_images"), known.get("teacher_calls")
        if images or calls:
            spent = f"saw {amount(images)} images" if images else "was trained elsewhere"
            if calls:
                spent += f" and answered {amount(calls)} calls"
            yield f"{group.name} has a teacher that {spent}, {left_out}"
        if OmegaConf.select(config, "first_stage.run") is not None:
            seconds = known.get("first_stage_seconds")
            took = f", of {duration(seconds)}" if seconds else ""
            yield f"{group.name} has a first stage with a training of its own{took}, {left_out}"
        if starts_from_weights(group):
            images = known.get("began_from_images")
            saw = f", of {amount(images)} images" if images else ""
            yield f"{group.name} starts from weights of another training{saw}, {left_out}"
        if OmegaConf.select(config, "alignment") is not None:
            yield f"{group.name} is aligned with a frozen network, whose calls no FLOPs here count"


def writes_by(run: Run) -> int | None:
    """The side of the patches that a network's last layer writes; None if it sees neighbours."""
    patch = OmegaConf.select(run.config, "backbone.patch")
    if OmegaConf.select(run.config, "backbone.name") == DIFFUSERS_DIT:
        patch = OmegaConf.select(
            run.config, "backbone.settings.patch_size", default=DIFFUSERS_PATCH
        )
    convolves = OmegaConf.select(run.config, "backbone.smooth")
    network = str(OmegaConf.select(run.config, "backbone._target_"))
    if patch in (None, 1) or convolves or network.endswith("UNet"):
        return None
    return patch


def machine(run: Run) -> str:
    """Device, precision, threads and processes of a run, as far as its summary has them."""
    known = run.summary
    parts = [str(known.get("device", "unknown device")), *filter(None, [known.get("precision")])]
    for key, one, more in (("threads", "thread", "threads"), ("ranks", "process", "processes")):
        if (count := known.get(key)) is not None:
            parts.append(f"{count} {one if count == 1 else more}")
    return ", ".join(parts)


def time_limits(runs: Sequence[Run]) -> list[int | None]:
    """The different time limits of runs in seconds, in rising order; None, the last, is none."""
    return sorted({time_limit(run) for run in runs}, key=lambda limit: (limit is None, limit))


def time_limit(run: Run) -> int | None:
    """The seconds of a run's time budget, or of the `trainer.max_time` that ended it; else None."""
    if (seconds := OmegaConf.select(run.config, "budget.seconds")) is not None:
        return seconds
    most, steps = (
        OmegaConf.select(run.config, f"trainer.max_{unit}") for unit in ("time", "steps")
    )
    ended_by_it = most and steps is not None and run.summary.get("steps", steps) < steps
    return round(Timer(most).time_remaining() or 0) if ended_by_it else None


def common(limits: Sequence[int | None]) -> int | None:
    """The time limit of all runs; None unless all have the same one."""
    return limits[0] if len(limits) == 1 else None


def in_words(limits: Sequence[int | None]) -> str:
    """Time limits in words; empty if there is none."""
    known = [f"{limit:,}" for limit in limits if limit is not None]
    return f"{joined(known)} seconds{', or none' * (None in limits)}" if known else ""


def span(runs: Sequence[Run], fact: str) -> tuple[float, float]:
    """The smallest and the largest value of `fact` in the summaries of runs."""
    values = [run.summary[fact] for run in runs]
    return min(values), max(values)
