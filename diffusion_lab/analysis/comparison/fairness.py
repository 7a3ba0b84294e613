"""What a comparison was at equal measure of: images, time, machines and operations of the runs."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.build.config_keys import SUBSET_SEED
from diffusion_lab.common.formats import amount, duration

EQUAL_IMAGES = 0.01  # relative difference: a last batch more or less
EQUAL_COST = 0.05  # more than the 2 % that a budget allows to each


def runs_of(groups: Sequence[Group]) -> list[Run]:
    return [member.run for group in groups for member in group.members]


def notes(groups: Sequence[Group]) -> list[str]:
    """Sentences on images and time of all runs."""
    runs = runs_of(groups)
    least, most = span([run.summary["images_seen"] for run in runs])
    seen = f"{least:,} images" if least == most else f"{least:,} to {most:,} images"
    if seconds := budgeted_seconds(runs):
        return [f"Every run was given {seconds:,} seconds and has seen {seen}"]
    times = dict.fromkeys(map(duration, span([run.training_seconds for run in runs])))
    return [
        f"Every run has seen {seen}" if least == most else f"Runs have seen {seen}",
        f"Training took {' to '.join(times)} of wall-clock time, by run",
    ]


def reservations(groups: Sequence[Group]) -> list[str]:
    """Sentences on what was not equal and should have been."""
    runs = runs_of(groups)
    if limit := budgeted_seconds(runs):
        said = short_trainings(runs, limit)
        said += unequal_machines(runs, "Time is equal and machines are not")
    else:
        said = unequal_images(runs) or unequal_macs(groups)
        said += unequal_machines(runs)
    return said + one_choice_of_images(groups)


def unequal_images(runs: Sequence[Run]) -> list[str]:
    least, most = span([run.summary["images_seen"] for run in runs])
    if most <= (1 + EQUAL_IMAGES) * least:
        return []
    return [f"Budgets are unequal: runs have seen {amount(least)} to {amount(most)} images"]


def unequal_macs(groups: Sequence[Group]) -> list[str]:
    """Of compositions, at equal images."""
    macs = [group.mean("macs") for group in groups if group.values("macs")]
    if not macs or max(macs) <= (1 + EQUAL_COST) * min(macs):
        return []
    return [
        f"Operations are unequal: compositions take {amount(min(macs))} to {amount(max(macs))} "
        "multiply-accumulates an image, at equal numbers of images"
    ]


def short_trainings(runs: Sequence[Run], limit: int) -> list[str]:
    """At equal time, of which grids and evaluations on the way have their share."""
    least, most = span([run.training_seconds for run in runs])
    if least >= (1 - EQUAL_COST) * limit:
        return []
    times = " to ".join(dict.fromkeys(f"{seconds:,.0f}" for seconds in (least, most)))
    return [
        f"Training itself took {times} of the {limit:,} seconds, by run: the limit counts figures "
        "and pictures taken on the way, too"
    ]


def one_choice_of_images(groups: Sequence[Group]) -> list[str]:
    """Where parts of the data are trained on."""
    settings = [group.members[0].settings for group in groups]
    seeds = {each.get(SUBSET_SEED) for each in settings}
    if len({group.data_size for group in groups}) == 1 or len(seeds) > 1 or None in seeds:
        return []
    return [
        f"One choice of the images stands for all ({SUBSET_SEED}={seeds.pop()}): what another "
        "would change is not in the intervals"
    ]


def unequal_machines(
    runs: Sequence[Run], consequence: str = "Time, speed and memory are of unequal machines"
) -> list[str]:
    """And what that means for the comparison."""
    machines = list(dict.fromkeys(map(machine, runs)))
    return [f"{consequence}: {'; '.join(machines)}"] if len(machines) > 1 else []


def machine(run: Run) -> str:
    """Device, precision, threads and processes of a run, as far as it says them."""
    known = run.summary
    parts = [str(known.get("device", "unknown device"))]
    if precision := known.get("precision"):
        parts.append(precision)
    for key, word in (("threads", "thread"), ("ranks", "process")):
        if (count := known.get(key)) is not None:
            plural = "es" if word == "process" else "s"
            parts.append(f"{count} {word}{plural if count != 1 else ''}")
    return ", ".join(parts)


def budgeted_seconds(runs: Sequence[Run]) -> int | None:
    """Seconds of training, if they were the budget of every run."""
    limits = {OmegaConf.select(run.config, "budget.seconds") for run in runs}
    return limits.pop() if len(limits) == 1 else None


def span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
