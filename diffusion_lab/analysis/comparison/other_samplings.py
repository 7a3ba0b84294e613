"""The same runs sampled in other ways, to see whether the conclusion depends on the sampling."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffusion_lab.analysis.comparison.groups import Group, runs_of
from diffusion_lab.analysis.comparison.measurements import finite, values_of
from diffusion_lab.analysis.comparison.verdict import Verdict, verdicts
from diffusion_lab.build.config_keys import flat
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.metric import Protocol
from diffusion_lab.runs.results import metrics_by
from diffusion_lab.runs.samplings import Sampling, differing, samplings_of


@dataclass(frozen=True)
class OtherSampling:
    """The groups as measured with another sampling, named by what is different, and a verdict."""

    label: str  # sampler.steps=50
    compared: str  # the same settings in the sampling of the comparison
    groups: list[Group]
    verdict: Verdict

    @property
    def sentence(self) -> str:
        return f"With {self.label}: {self.verdict.answer}"


def other_samplings(
    groups: Sequence[Group],
    protocol: Protocol,
    sampling: Sampling,
    names: Mapping[str, str],
    metric: Quantity,
    test: str,
    seeds: Sequence[int] | None,
) -> list[OtherSampling]:
    """Finds the samplings, beside `sampling`, by which all runs were measured with `protocol`.

    Each has a verdict by `metric` over `seeds`, whose tests are corrected by themselves. `names`
    are the metrics' full names by short ones.
    """
    runs = runs_of(groups)
    alike = [record for run in runs for record in run.kept if record["protocol"] == protocol]
    ways = {json.dumps(way, sort_keys=True) for record in alike for way in samplings_of(record)}
    shared = [
        way
        for way in map(json.loads, ways)
        if all(metrics_by(run.kept, protocol, way) for run in runs)
    ]
    others = [way for way in shared if way != sampling and way["seed"] == sampling["seed"]]
    found = []
    for way in sorted(others, key=lambda way: label_of(way, sampling)):
        measured = [_measured(group, protocol, way, names) for group in groups]
        judged = verdicts(measured, [metric], metric.name, test, seeds)
        if metric.name in judged:
            labels = label_of(way, sampling), label_of(sampling, way)
            found.append(OtherSampling(*labels, measured, judged[metric.name]))
    return found


def label_of(way: Sampling, sampling: Sampling) -> str:
    """The settings of a sampling that differ from those of another one."""
    ours, theirs = flat(way), flat(sampling)
    return " ".join(f"{key}={ours.get(key)}" for key in differing(ours, theirs))


def _measured(group: Group, protocol: Protocol, way: Sampling, names: Mapping[str, str]) -> Group:
    """The group with the metrics of another sampling in place of its own."""
    runs = []
    for run in group.runs:
        metrics = metrics_by(run.kept, protocol, way)
        runs.append(replace(run, values=finite(values_of(run, metrics, names, {}))))
    return replace(group, runs=tuple(runs))
