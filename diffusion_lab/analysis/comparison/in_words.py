"""The data, the protocol, the sampling and the correction of a comparison, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lab.analysis.comparison.groups import Group, runs_of, trained
from diffusion_lab.analysis.comparison.verdict import Verdict, counted
from diffusion_lab.metrics.metric import Protocol
from diffusion_lab.runs.samplings import OWN, OWN_WAY, Sampling


def setting(
    groups: Sequence[Group], protocol: Protocol, sampling: Sampling, names: Mapping[str, str]
) -> str:
    """A line on the data, the protocol, and the sampler and guidance of all runs."""
    runs = runs_of(groups)
    others = " and sets of images" if any(run.drawn_elsewhere for run in runs) else ""
    data = sorted({run.config.data.source["_target_"].rpartition(".")[2] for run in runs})
    accuracy = names.get("accuracy")
    read_by = f", accuracy by {accuracy.split('/')[1]}" if accuracy else ""
    return (
        f"{len(runs)} runs{others} on {', '.join(data)}; {protocol['num_samples']:,} samples each, "
        f"compared with {reference_in(protocol)} by features of {protocol['extractor']}{read_by}; "
        f"{drawing_in(sampling)} [protocol {protocol['fingerprint']}]"
    )


def reference_in(protocol: Protocol) -> str:
    """The reference of a protocol in words."""
    words = {
        "validation": "validation images",
        "FILE": f"images of file {protocol.get('reference_file')}",
    }
    kind = words.get(str(protocol.get("reference")), "training images")
    count = protocol["reference_images"]
    return f"{count:,} {kind}" if count else kind.replace("images of", "the statistics in")


def drawing_in(sampling: Sampling) -> str:
    """The sampler, guidance and seed in words."""
    if not sampling:
        return "drawn by other programs"
    own = "each run sampled with its training seed"
    seeds = own if sampling["seed"] == OWN else f"sampling seed {sampling['seed']}"
    return f"{way_in(sampling)}, {seeds}"


def ways_notes(groups: Sequence[Group], sampling: Sampling) -> list[str]:
    """A sentence on how each composition is drawn, if each is in its own way."""
    if sampling.get("sampler") != OWN:
        return []
    groups = trained(groups)
    return [f"{g.name} is drawn by {way_in(g.runs[0].kept[0][OWN_WAY])}" for g in groups]


def way_in(sampling: Sampling) -> str:
    """The sampler and guidance in words."""
    sampler: Any = sampling.get("sampler")
    guidance: Any = sampling.get("guidance")
    if sampler == OWN:
        return "each composition drawn in its own way"
    if not sampler:
        return "one network call"
    drawn = sampler["_target_"].rpartition(".")[2]
    if sampler.get("steps"):
        drawn += f" with {sampler['steps']} steps"
    return f"{drawn}, guidance scale {guidance.get('scale')}"


def correction_notes(judged: Mapping[str, Verdict], primary: str | None) -> list[str]:
    """A sentence on the tests that Holm's correction covers; none for a single test."""
    total = sum(verdict.tests for verdict in judged.values())
    if total < 2:
        return []
    if primary is not None and primary in judged:
        return [
            f"Holm's correction covers the {counted(judged[primary].tests, 'test')} of the primary "
            f"metric, and for any other metric all {total} tests of all metrics"
        ]
    return [f"Holm's correction covers all {total} tests of all metrics"]
