"""The reference and the sampling of a comparison, in words."""

from collections.abc import Sequence
from typing import Any

from diffusion_lab.analysis.comparison.groups import Group, trained
from diffusion_lab.metrics.metric import Protocol
from diffusion_lab.runs.samplings import OWN, OWN_WAY, Sampling


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


def ways_note(groups: Sequence[Group], sampling: Sampling) -> list[str]:
    """A sentence on how each composition is drawn, if each is in its own way."""
    if sampling.get("sampler") != OWN:
        return []
    ways = [f"{g.name} by {way_in(g.runs[0].kept[0][OWN_WAY])}" for g in trained(groups)]
    return [f"Each composition is drawn in its own way: {'; '.join(ways)}"]


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
