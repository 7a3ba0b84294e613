"""Facts on how runs were made: protocol, budgets, tuning, machines, and what was not equal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os.path import abspath
from typing import Any

from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import SUBSET_SEED, flattered
from diffusion_lab.common.formats import joined
from diffusion_lab.metrics.quantity import quantity_of
from diffusion_lab.report.arms import Arm, runs_of, trained
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.records import Run
from diffusion_lab.report.tests import JOINT
from diffusion_lab.report.words import Fact
from diffusion_lab.runs.progress import seconds_in
from diffusion_lab.runs.results import OWN, OWN_WAY

EQUAL_IMAGES = 0.01  # relative difference, for a last batch more or less
EQUAL_COST = 0.05  # relative difference, above the 2 % that budget=macs allows each run
EQUAL_SPEED = 0.1  # by which images/s of an arm may vary before times say nothing of the arm
# of 162 runs of studies, those whose loss stayed calm had at most 27; from 45 on it rose by 12 %
SPIKE = 40  # times the median
LENGTH = ("budget.", "trainer.")  # start the keys of a run's length


def notes(found: Collection) -> list[Fact]:
    """The facts on the whole comparison: its protocol, tuning, and ways of drawing."""
    facts = [*_of_protocol(found), *_of_tuning(found.arms)]
    for arm in found.arms:
        if arm.drawn_elsewhere:
            facts.append(Fact("drawn_elsewhere", arm=arm.name))
        elif found.sampling.get("sampler") == OWN:
            facts.append(Fact("drawn_by", arm=arm.name, way=arm.runs[0].kept[0][OWN_WAY]))
    if found.protocol.get("reference") == "validation":
        facts.append(Fact("by_validation"))
    return facts + found.omitted


def reservations(found: Collection) -> list[Fact]:
    """The facts on conditions that should be equal, and whether they were."""
    arms = trained(found.arms)
    runs = runs_of(arms)
    facts = [*_of_budgets(arms), *_of_preparation(arms)] if arms else []
    parameters = [known for arm in arms if (known := arm.fact("parameters"))]
    if unequal(parameters):
        facts.append(Fact("parameters_unequal", least=min(parameters), most=max(parameters)))
    for arm in arms:
        spikes = [spike for run in arm.runs if (spike := run.gradient_spike) >= SPIKE]
        if spikes:
            of = {"runs": len(spikes), "all": len(arm.runs), "most": max(spikes)}
            facts.append(Fact("spikes", arm=arm.name, **of))
    if uneven := uneven_speeds(arms):
        facts.append(Fact("speeds_vary", arms=uneven))
    machines = [*dict.fromkeys(map(machine, runs))]
    if len(machines) > 1:
        facts.append(Fact("other_machines", machines=machines))
    choices = {run.settings.get(SUBSET_SEED) for run in runs}
    if len({arm.data_size for arm in arms}) > 1 and len(choices) == 1 and None not in choices:
        facts.append(Fact("one_choice", key=SUBSET_SEED, seed=choices.pop()))
    return facts


def unequal(amounts: Sequence[float], tolerance: float = EQUAL_COST) -> bool:
    """Whether amounts differ by more than a relative tolerance."""
    return bool(amounts) and max(amounts) > (1 + tolerance) * min(amounts)


def _of_protocol(found: Collection) -> Iterator[Fact]:
    """Yields facts on the protocol, the commit that held it, and seeds beside it."""
    arms, study = trained(found.arms), found.study
    if not study:
        several = any(run.config.get("protocol") for run in runs_of(arms))
        yield Fact("protocols_differ" if several else "no_protocol")
        return
    metric = quantity_of(study["metric"], list(found.metrics.values()))
    title = metric.title if metric else study["metric"]
    yield Fact("protocol", metric=title, test=study.get("test", JOINT), seeds=study["seeds"])
    yield Fact("stop", rule=study["stop"])
    if found.values(study["metric"]).empty:
        yield Fact("not_measured", metric=title)
    planned = [run for run in runs_of(arms) if run.part("protocol")]  # autoencoders have none
    first = min(planned, key=lambda run: run.finished_at)
    commit, began = first.summary.git_commit, _seeds_of([first])
    yield Fact("commit", commit=commit) if commit else Fact("no_commit")
    for arm in arms:
        own, asked = {run.seed for run in arm.runs}, _seeds_of(arm.runs) or began
        if later := sorted(asked - began):
            yield Fact("planned_later", arm=arm.name, seeds=later)
        if own != asked:
            more = {"missing": sorted(asked - own), "beside": sorted(own - asked)}
            yield Fact("other_seeds", arm=arm.name, **more)


def _seeds_of(runs: Sequence[Run]) -> set[int]:
    """The seeds that the protocols of runs ask for."""
    return {seed for run in runs for seed in run.part("protocol").get("seeds", ())}


def _of_budgets(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields facts on what runs had alike: time, images, operations, or nothing."""
    runs = runs_of(arms)
    seen = [run.summary.images_seen or 0 for run in runs]
    images = min(seen), max(seen)
    limits = sorted({time_limit(run) for run in runs}, key=lambda each: (each is None, each))
    if limits != [None]:
        yield Fact("time_limits", seconds=limits, images=images)
        return
    if unequal(seen, EQUAL_IMAGES):
        # without arms that start from weights of whose training nothing is known
        known = [
            arm
            for arm in arms
            if all(r.summary.began_from_flops for r in arm.runs) or not _begins(arm.runs[0])
        ]
        spent = [run.summary.flops_behind(anew=not _begins(run)) or 0 for run in runs_of(known)]
        if len(known) < 2 or not min(spent) or unequal(spent):
            yield Fact("budgets_unequal", images=images)
            return
        yield Fact("flops_equal", images=images, share=max(spent) / min(spent) - 1)
        return
    yield Fact("images", images=images)
    per_image = [each for arm in arms if (each := arm.runs[0].summary.flops(1))]
    if unequal(per_image):
        yield Fact("operations_unequal", least=min(per_image), most=max(per_image))


def _begins(run: Run) -> bool:
    """Whether a run starts from trained weights that are not those of its teacher."""
    start = run.config.get("init_from")
    teacher = OmegaConf.select(run.config, "objective.teacher.run")
    return start is not None and (teacher is None or abspath(start) != abspath(teacher))


def _of_preparation(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields a fact on each other network behind an arm's runs, and on initial weights."""
    for arm in arms:
        known, config = arm.runs[0].summary, arm.runs[0].config
        images, calls = known.teacher_images, known.teacher_calls
        if images or calls:
            yield Fact("taught", arm=arm.name, images=images, calls=calls)
        if OmegaConf.select(config, "first_stage.run") is not None:
            yield Fact("first_stage", arm=arm.name, seconds=known.first_stage_seconds)
        if _begins(arm.runs[0]):
            yield Fact("began", arm=arm.name, images=known.began_from_images)
        if flattered(config, config.get("metrics")):
            yield Fact("flattered", arm=arm.name)
        elif OmegaConf.select(config, "alignment.extractor") is not None:
            yield Fact("aligned", arm=arm.name)


def uneven_speeds(arms: Sequence[Arm]) -> list[str]:
    """The arms whose runs had unequal speeds, as on a machine that others used."""
    rates = {arm.name: [r for run in arm.runs if (r := run.images_per_second)] for arm in arms}
    return [name for name, own in rates.items() if unequal(own, EQUAL_SPEED)]


def machine(run: Run) -> str:
    """Device, precision, threads and processes of a run, as far as its summary has them."""
    known = run.summary
    parts = [known.device or "unknown device", *filter(None, [known.precision])]
    counted = ((known.threads, "thread", "threads"), (known.ranks, "process", "processes"))
    parts += [f"{n} {one if n == 1 else more}" for n, one, more in counted if n is not None]
    return ", ".join(parts)


def time_limit(run: Run) -> int | None:
    """The seconds of a run's time budget, or of the `trainer.max_time` that ended it; else None."""
    seconds = OmegaConf.select(run.config, "budget.seconds")
    most, steps = (
        OmegaConf.select(run.config, f"trainer.max_{unit}") for unit in ("time", "steps")
    )
    ended = seconds is not None or (steps is not None and run.summary.steps < steps)
    return round(seconds_in(most)) if most and ended else seconds


def tunings(arms: Sequence[Arm]) -> list[tuple[Arm, dict[str, Any]]]:
    """The arms that were tuned, one for each set of trials, named without the data's size."""
    found: list[tuple[Arm, dict[str, Any]]] = []
    for arm in arms:
        part = arm.runs[0].part("tuning")
        if part.get("tried") and all(part["tried"] != other["tried"] for _, other in found):
            found.append((replace(arm, name=arm.line), part))
    return found


def at_random(part: dict[str, Any]) -> bool:
    """Whether trials had random values, as a range among them says, and not all of a grid."""
    return any(isinstance(each, Mapping) for each in part["values"].values())


def _of_tuning(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields facts on what was tuned, or on what should have been."""
    arms = trained(arms)  # nothing is known of images of others
    tuned = [arm.runs[0].part("tuning").get("tried") is not None for arm in arms]
    if not any(tuned):
        if any(key.startswith("backbone.") for arm in arms for key in arm.settings):
            yield Fact("not_tuned")
        return
    if not all(tuned):
        yield Fact("some_tuned", arms=sum(tuned), all=len(arms))
    found = tunings(arms)
    counts = [len(part["tried"]) for _, part in found]
    budgets = []
    for _, part in found:
        length = [each for each in part.get("overrides", []) if each.startswith(LENGTH)]
        own = (part["metric"], part["images"], len(part["seeds"]), sorted(part["values"]))
        budgets.append((*own, length))
    first = found[0][1]
    of = {key: first.get(key, []) for key in ("metric", "images", "seeds", "overrides")}
    yield Fact("tuned", **of, keys=list(first["values"]), counts=(min(counts), max(counts)))
    if any(each != budgets[0] for each in budgets):
        yield Fact("tuned_unequally")
    for arm, part in found:
        for key, best in part["chosen"].items():
            if isinstance(part["values"][key], Mapping):
                continue
            grid = [each["values"][key] for each in part["tried"]]
            if best in (min(grid), max(grid)):
                yield Fact("at_an_end", key=key, arm=arm.name, value=best)


def setting(found: Collection) -> Fact:
    """The data, the protocol, and the sampler and guidance of all runs."""
    data = {run.config.data.source["_target_"].rpartition(".")[2] for run in found.runs}
    return Fact(
        "setting",
        runs=len(found.runs),
        images=any(run.drawn_elsewhere for run in found.runs),
        data=joined(sorted(data)),
        protocol=found.protocol,
        sampling=found.sampling,
        seeds=found.seeds,
        classifier=classifier_of(found.names),
    )


def classifier_of(names: dict[str, str]) -> str | None:
    """The name of the classifier that accuracy was measured with."""
    return names["accuracy"].split("/")[1] if "accuracy" in names else None
