"""The protocol that a study fixed before its runs, as the runs' configurations hold it."""

from collections.abc import Iterator, Sequence
from typing import Any

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.groups import Group, runs_of
from diffusion_lab.metrics.quantities import quantity_of
from diffusion_lab.runs.autoencoder_run import AutoencoderRun
from diffusion_lab.runs.environment import DIRTY
from diffusion_lab.runs.results import common_metrics
from diffusion_lab.runs.samplings import OWN, way_of
from diffusion_lab.training.protocol import TESTS


def protocol_of(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The protocol of all runs; None if some have none, or another one.

    Autoencoders, which have none, follow that of the runs beside them.
    """
    found = [run.part("protocol") for run in runs if run.kind is not AutoencoderRun]
    return found[0] if found and all(each == found[0] for each in found) else None


def with_own_ways(runs: Sequence[Run]) -> list[Run]:
    """The runs, with records that say in which way each is drawn, if ways may differ.

    They may if the runs' protocol says so, each then by its own configuration. They must if the
    runs are of several families, which have no sampler in common: each family then has one way.
    Raises UserError for a family that has none.
    """
    trained = [run for run in runs if not run.drawn_elsewhere]
    if (protocol_of(trained) or {}).get("sampling") == OWN:
        return [run if run.drawn_elsewhere else run.drawn_in(run.own_way) for run in runs]
    families = dict.fromkeys(run.kind for run in trained)
    if len(families) < 2:
        return list(runs)
    ways = {}
    for family in families:
        kept = {run.folder: run.kept for run in trained if run.kind is family}
        _, sampling, _ = common_metrics(kept)
        ways[family] = way_of(sampling)
    return [run.drawn_in(ways[run.kind]) if run.kind in ways else run for run in runs]


def of_one_protocol(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs without autoencoders whose samples were measured as no other run's, and sentences.

    Runs of one family alone are all kept.
    """
    others = [run.kept for run in runs if run.kind is not AutoencoderRun]
    known = [record["protocol"] for records in others for record in records]
    kept, said = [], []
    for run in runs:
        alike = not known or any(record["protocol"] in known for record in run.kept)
        if alike or run.kind is not AutoencoderRun:
            kept.append(run)
        else:
            said.append(
                f"{run.folder} is left out: its samples were measured in another way; measure them "
                f"like the others with `diffusion-lab evaluate run={run.folder} metrics...=...`"
            )
    return kept, said


def notes(groups: Sequence[Group]) -> Iterator[str]:
    """Yields sentences on the protocol, the commit that held it, and seeds beside it."""
    runs = runs_of(groups)
    agreed = protocol_of(runs)
    if agreed is None:
        if any(run.config.get("protocol") for run in runs):
            yield "The runs follow different protocols, so no metric is the primary one"
        else:
            yield "No protocol was fixed before the runs, so no metric is the primary one"
        return
    metric = quantity_of(agreed["metric"])
    title = metric.title if metric else agreed["metric"]
    seeds = ", ".join(map(str, agreed["seeds"]))
    yield f'Question: "{agreed["question"]}"'
    yield f"Protocol: {title} decides, by {TESTS[agreed['test']]} over seeds {seeds}"
    yield f"Stopping rule: {agreed['stop']}"
    if not any(group.values(agreed["metric"]) for group in groups):
        yield f"{title} was not measured, so the protocol decides nothing"
    yield commit_of(min(runs, key=lambda run: run.finished_at))
    none = not {run.seed for run in runs} & set(agreed["seeds"])
    counts = "counts, since no run has its seeds" if none else "does not count"
    for group in groups:
        own = {run.seed for run in group.runs}
        if missing := sorted(set(agreed["seeds"]) - own):
            yield f"{group.name} has no run of seed {', '.join(map(str, missing))}"
        if more := sorted(own - set(agreed["seeds"])):
            yield (
                f"{group.name} has seeds beyond the protocol, which {title} {counts}: "
                f"{', '.join(map(str, more))}"
            )


def commit_of(first: Run) -> str:
    """A sentence on the commit that was checked out for the first run that ended."""
    commit = first.summary.get("git_commit")
    if commit is None:
        return "No commit is known that held this protocol"
    name = commit.removesuffix(DIRTY)
    changed = ", with changes that were not committed" if name != commit else ""
    return f"Commit {name[-40:][:9]} was checked out for the first run that ended{changed}"
