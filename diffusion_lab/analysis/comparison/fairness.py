"""Fairness of a comparison: whether images, time, operations and machines of runs are equal."""

from collections.abc import Iterator, Sequence

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.groups import Group, runs_of, trained
from diffusion_lab.build.config_keys import SUBSET_SEED, flattered
from diffusion_lab.common.formats import amount, duration

EQUAL_IMAGES = 0.01  # relative difference, for a last batch more or less
NAMED_MACHINES = 2
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
    if seconds := budgeted_seconds(runs):
        return [*said, f"Every run had a time limit of {seconds:,} seconds and saw {seen}"]
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
    if limit := budgeted_seconds(runs):
        least, most = span(runs, "training_seconds")
        if least < (1 - EQUAL_COST) * limit:
            times = " to ".join(dict.fromkeys(f"{seconds:,.0f}" for seconds in (least, most)))
            yield (
                f"Training itself took {times} of the {limit:,} seconds: the limit includes "
                "evaluations and pictures during training"
            )
    else:
        least, most = span(runs, "images_seen")
        macs = [group.mean("macs") for group in groups if group.values("macs")]
        if most > (1 + EQUAL_IMAGES) * least:
            yield f"Budgets are unequal: runs saw {amount(least)} to {amount(most)} images"
        elif macs and max(macs) > (1 + EQUAL_COST) * min(macs):
            yield (
                f"Operations are unequal: compositions take {amount(min(macs))} to "
                f"{amount(max(macs))} multiply-accumulates per image, at equal numbers of images"
            )
    yield from unequal_networks(groups)
    yield from taught(groups)
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
    precisions = {
        str(run.summary["precision"])
        for g in groups
        for run in g.runs
        if "precision" in run.summary
    }
    if len(precisions) > 1:
        yield f"Precision is unequal: {' and '.join(sorted(precisions))}"


def taught(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a sentence on what the teacher of a group's runs cost, for each that has one."""
    for group in groups:
        known = group.runs[0].summary
        images, calls = known.get("teacher_images"), known.get("teacher_calls")
        if not (images or calls):
            continue
        spent = f"saw {amount(images)} images" if images else "was trained elsewhere"
        if calls:
            spent += f" and answered {amount(calls)} calls"
        yield f"{group.name} has a teacher that {spent}, which its own images and time leave out"


def writes_by(run: Run) -> int | None:
    """The side of the patches that a network's last layer writes; None if it sees neighbours."""
    patch = OmegaConf.select(run.config, "backbone.patch")
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


def budgeted_seconds(runs: Sequence[Run]) -> int | None:
    """The time budget in seconds; None unless all runs have the same one."""
    limits = {OmegaConf.select(run.config, "budget.seconds") for run in runs}
    return limits.pop() if len(limits) == 1 else None


def span(runs: Sequence[Run], fact: str) -> tuple[float, float]:
    """The smallest and the largest value of `fact` in the summaries of runs."""
    values = [run.summary[fact] for run in runs]
    return min(values), max(values)
