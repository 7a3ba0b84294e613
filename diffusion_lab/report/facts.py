"""Facts on how runs were made: protocol, budgets, tuning, machines, and what was not equal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from diffusion_lab.runs.files import DIRTY
from diffusion_lab.runs.progress import seconds_in
from diffusion_lab.runs.results import OWN, OWN_WAY

EQUAL_IMAGES = 0.01  # relative difference, for a last batch more or less
EQUAL_COST = 0.05  # relative difference, above the 2 % that budget=macs allows each run
EQUAL_SPEED = 0.1  # by which images/s of an arm may vary before times say nothing of the arm
BIASED = 1 / 3  # share of real images in a metric above which its bias is worth a word
# of 162 runs of studies, those whose loss stayed calm had at most 27; from 45 on it rose by 12 %
SPIKE = 40  # times the median
DIFFUSERS_DIT, DIFFUSERS_PATCH = "DiTTransformer2DModel", 2  # and its patch, if none is set
LENGTH = ("budget.", "trainer.")  # start the keys of a run's length
Points = list[tuple[float, list[float]]]  # the values of a key in rising order, with their results


def notes(found: Collection) -> list[Fact]:
    """The facts on the whole comparison: its protocol, tuning, budgets and ways."""
    facts = [*_of_protocol(found), *_of_tuning(found.arms), *_of_budgets(found.arms)]
    if found.sampling.get("sampler") == OWN:
        facts += [
            Fact("drawn_by", arm=arm.name, way=arm.runs[0].kept[0][OWN_WAY])
            for arm in trained(found.arms)
        ]
    facts += found.omitted
    if found.protocol.get("reference") == "validation":
        facts.append(Fact("by_validation"))
    return facts


def reservations(found: Collection) -> list[Fact]:
    """The facts on conditions that should have been equal and were not."""
    arms = trained(found.arms)
    facts = [*_unequal_budgets(arms), *_unequal_networks(arms), *_prepared(arms)] if arms else []
    for arm in arms:
        config = arm.runs[0].config
        if flattered(config, config.get("metrics")):
            facts.append(Fact("flattered", arm=arm.name))
        spikes = [spike for run in arm.runs if (spike := run.gradient_spike) >= SPIKE]
        if spikes:
            of = {"runs": len(spikes), "all": len(arm.runs), "most": max(spikes)}
            facts.append(Fact("spikes", arm=arm.name, **of))
    if uneven := uneven_speeds(arms):
        facts.append(Fact("speeds_vary", arms=uneven))
    machines = dict.fromkeys(map(machine, runs_of(arms)))
    if len(machines) > 1:
        kind = "other_machines_in_time" if common(time_limits(runs_of(arms))) else "other_machines"
        facts.append(Fact(kind, machines=list(machines)))
    choices = {run.settings.get(SUBSET_SEED) for run in runs_of(arms)}
    if len({arm.data_size for arm in arms}) > 1 and len(choices) == 1 and None not in choices:
        facts.append(Fact("one_choice", key=SUBSET_SEED, seed=choices.pop()))
    return facts


def _of_protocol(found: Collection) -> Iterator[Fact]:
    """Yields facts on the protocol, the commit that held it, and seeds beside it."""
    runs, study = runs_of(trained(found.arms)), found.study
    if not study:
        several = any(run.config.get("protocol") for run in runs)
        yield Fact("protocols_differ" if several else "no_protocol")
        return
    metric = quantity_of(study["metric"], list(found.metrics.values()))
    title = metric.title if metric else study["metric"]
    yield Fact("protocol", metric=title, test=study.get("test", JOINT), seeds=study["seeds"])
    yield Fact("stop", rule=study["stop"])
    if found.values(study["metric"]).empty:
        yield Fact("not_measured", metric=title)
    first = min(runs, key=lambda run: run.finished_at)
    commit = first.summary.git_commit
    if commit is None:
        yield Fact("no_commit")
    else:
        name = commit.removesuffix(DIRTY)
        yield Fact("commit" if name == commit else "dirty_commit", commit=name[-40:][:9])
    none = not {run.seed for run in runs} & set(study["seeds"])
    for arm in trained(found.arms):
        own = {run.seed for run in arm.runs}
        if missing := sorted(set(study["seeds"]) - own):
            yield Fact("seeds_missing", arm=arm.name, seeds=missing)
        if more := sorted(own - set(study["seeds"])):
            kind = "seeds_beside_that_count" if none else "seeds_beside"
            yield Fact(kind, arm=arm.name, metric=title, seeds=more)


def _of_budgets(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields facts on the images seen and the training time of all runs, and on other images."""
    for arm in arms:
        if arm.drawn_elsewhere:
            yield Fact("drawn_elsewhere", arm=arm.name)
    runs = runs_of(trained(arms))
    if not runs:
        return
    seen = span(runs, "images_seen")
    limits = time_limits(runs)
    if limits != [None]:
        yield Fact("time_limits", seconds=limits, images=seen)
        return
    yield Fact("images", images=seen)
    yield Fact("took", seconds=span(runs, "training_seconds"))


def _unequal_budgets(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields facts on unequal time limits, images or operations."""
    runs = runs_of(arms)
    limits = time_limits(runs)
    least, most = span(runs, "training_seconds")
    if limit := common(limits):
        if least < (1 - EQUAL_COST) * limit:
            yield Fact("shorter_than_limit", least=least, most=most, limit=limit)
        return
    if limits != [None]:
        yield Fact("limits_unequal", seconds=limits)
        return
    images = span(runs, "images_seen")
    per_image = [each for arm in arms if (each := arm.runs[0].summary.flops(1))]
    if images[1] > (1 + EQUAL_IMAGES) * images[0]:
        known = [arm for arm in arms if not _unknown_start(arm)]
        spent = [each for arm in known for run in arm.runs if (each := _spent(run)) is not None]
        count = sum(len(arm.runs) for arm in known)
        if len(known) < 2 or len(spent) < count or max(spent) > (1 + EQUAL_COST) * min(spent):
            yield Fact("budgets_unequal", images=images)
            return
        kind = "flops_equal" if len(known) == len(arms) else "known_flops_equal"
        yield Fact(kind, images=images, share=max(spent) / min(spent) - 1)
    elif per_image and max(per_image) > (1 + EQUAL_COST) * min(per_image):
        yield Fact("operations_unequal", least=min(per_image), most=max(per_image))


def _spent(run: Run) -> float | None:
    """The FLOPs of training a run, its teacher, and the weights that it starts from, if known."""
    return run.summary.flops_behind(anew=not _starts_from_weights(run))


def _unknown_start(arm: Arm) -> bool:
    """Whether an arm's runs start from weights of whose training nothing is known."""
    known = (run.summary.began_from_flops for run in arm.runs)
    return _starts_from_weights(arm.runs[0]) and not all(known)


def _starts_from_weights(run: Run) -> bool:
    """Whether a run starts from trained weights that are not those of its teacher."""
    start = run.config.get("init_from")
    teacher = OmegaConf.select(run.config, "objective.teacher.run")
    return start is not None and (teacher is None or abspath(start) != abspath(teacher))


def _unequal_networks(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields facts on parameters, output layers and precision that differ between arms."""
    parameters = [known for arm in arms if (known := arm.fact("parameters"))]
    if parameters and max(parameters) > (1 + EQUAL_COST) * min(parameters):
        yield Fact("parameters_unequal", least=min(parameters), most=max(parameters))
    patches = {writes_by(arm.runs[0]) for arm in arms}
    if len(patches) > 1:
        yield Fact("outputs_unequal", patches=sorted(patches, key=str))
    summaries = [run.summary for run in runs_of(arms)]
    precisions = {each.precision for each in summaries if each.precision}
    if len(precisions) > 1:
        yield Fact("precision_unequal", precisions=sorted(precisions))


def _prepared(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields a fact on each other network behind an arm's runs, and on initial weights."""
    for arm in arms:
        known, config = arm.runs[0].summary, arm.runs[0].config
        images, calls = known.teacher_images, known.teacher_calls
        if images or calls:
            yield Fact("taught", arm=arm.name, images=images, calls=calls)
        if OmegaConf.select(config, "first_stage.run") is not None:
            yield Fact("first_stage", arm=arm.name, seconds=known.first_stage_seconds)
        if _starts_from_weights(arm.runs[0]):
            yield Fact("began", arm=arm.name, images=known.began_from_images)
        if OmegaConf.select(config, "alignment") is not None:
            yield Fact("aligned", arm=arm.name)


def writes_by(run: Run) -> int | None:
    """The side of the patches that a network's last layer writes; None if it sees neighbours."""
    patch = OmegaConf.select(run.config, "backbone.patch")
    if OmegaConf.select(run.config, "backbone.name") == DIFFUSERS_DIT:
        patch = OmegaConf.select(
            run.config, "backbone.settings.patch_size", default=DIFFUSERS_PATCH
        )
    convolves = OmegaConf.select(run.config, "backbone.smooth")
    network = str(OmegaConf.select(run.config, "backbone._target_"))
    return None if patch in (None, 1) or convolves or network.endswith("UNet") else patch


def uneven_speeds(arms: Sequence[Arm]) -> list[str]:
    """The arms whose runs had unequal speeds, as on a machine that others used."""
    found = []
    for arm in arms:
        rates = [rate for run in arm.runs if (rate := run.images_per_second)]
        if rates and max(rates) > (1 + EQUAL_SPEED) * min(rates):
            found.append(arm.name)
    return found


def machine(run: Run) -> str:
    """Device, precision, threads and processes of a run, as far as its summary has them."""
    known = run.summary
    parts = [known.device or "unknown device", *filter(None, [known.precision])]
    counted = ((known.threads, "thread", "threads"), (known.ranks, "process", "processes"))
    parts += [f"{n} {one if n == 1 else more}" for n, one, more in counted if n is not None]
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
    if not most or steps is None or run.summary.steps >= steps:
        return None
    return round(seconds_in(most))


def common(limits: Sequence[int | None]) -> int | None:
    """The time limit of all runs; None unless all have the same one."""
    return limits[0] if len(limits) == 1 else None


def span(runs: Sequence[Run], name: str) -> tuple[float, float]:
    """The smallest and the largest value of a number in the summaries of runs."""
    values = [getattr(run.summary, name) for run in runs]
    return min(values), max(values)


@dataclass(frozen=True)
class Tuned:
    """The tuning of an arm; `facts` are its configuration's, with what was tried."""

    arm: Arm
    facts: dict[str, Any]

    @property
    def budget(self) -> tuple:
        """The properties that should be equal for all arms."""
        facts = self.facts
        length = [each for each in facts.get("overrides", []) if each.startswith(LENGTH)]
        return (
            facts["metric"],
            facts["images"],
            length,
            len(facts["seeds"]),
            sorted(facts["values"]),
        )

    def curve(self, key: str) -> Points:
        """The results by value of a key, where the other keys have their chosen values.

        Values at which a run diverged are left out.
        """
        chosen, points = self.facts["chosen"], []
        for each in self.facts["tried"]:
            values, results = each["values"], list(each["results"].values())
            if None not in results and all(values[k] == chosen[k] for k in chosen if k != key):
                points.append((values[key], results))
        return sorted(points)

    def at_an_end(self, key: str) -> bool:
        """Whether the chosen value is the first or the last that was tried."""
        grid = [each["values"][key] for each in self.facts["tried"]]
        return self.facts["chosen"][key] in (min(grid), max(grid))


def tuned_in(arms: Sequence[Arm]) -> list[Tuned]:
    """The tuning of each arm that was tuned."""
    parts = ((arm, arm.runs[0].part("tuning")) for arm in arms)
    return [Tuned(arm, part) for arm, part in parts if part and part.get("tried")]


def distinct(arms: Sequence[Arm]) -> list[Tuned]:
    """One of each set of arms that share their trials, named without the part of the data."""
    found: list[Tuned] = []
    for each in tuned_in(arms):
        if all(each.facts["tried"] != other.facts["tried"] for other in found):
            found.append(replace(each, arm=replace(each.arm, name=each.arm.line)))
    return found


def _of_tuning(arms: Sequence[Arm]) -> Iterator[Fact]:
    """Yields facts on what was tuned, or on what should have been."""
    tuned = tuned_in(arms)
    if not tuned:
        if any(key.startswith("backbone.") for arm in arms for key in arm.settings):
            yield Fact("not_tuned")
        return
    if len(tuned) < len(arms):
        yield Fact("some_tuned", arms=len(tuned), all=len(arms))
    found, facts = distinct(arms), tuned[0].facts
    counts = [len(each.facts["tried"]) for each in found]
    known = {key: facts[key] for key in ("metric", "images", "seeds")}
    keys = {"keys": list(facts["values"]), "overrides": facts.get("overrides", [])}
    yield Fact("tuned", **known, **keys, counts=(min(counts), max(counts)))
    if any(each.budget != tuned[0].budget for each in found):
        yield Fact("tuned_unequally")
    for each in found:
        for key, best in each.facts["chosen"].items():
            if each.at_an_end(key):
                yield Fact("at_an_end", key=key, arm=each.arm.name, value=best)


def setting(found: Collection) -> Fact:
    """The data, the protocol, and the sampler and guidance of all runs."""
    runs = found.runs
    data = {run.config.data.source["_target_"].rpartition(".")[2] for run in runs}
    return Fact(
        "setting",
        runs=len(runs),
        images=any(run.drawn_elsewhere for run in runs),
        data=joined(sorted(data)),
        protocol=found.protocol,
        sampling=found.sampling,
        classifier=classifier_of(found.names),
    )


def classifier_of(names: dict[str, str]) -> str | None:
    """The name of the classifier that accuracy was measured with."""
    return names["accuracy"].split("/")[1] if "accuracy" in names else None
