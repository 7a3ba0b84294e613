"""The reference and the sampling of a comparison, in words."""

from typing import Any

from diffusion_lab.metrics.metric import Protocol
from diffusion_lab.runs.results import OWN, Sampling


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
    sampler: Any = sampling["sampler"]
    guidance: Any = sampling["guidance"]
    drawn = sampler["_target_"].rpartition(".")[2]
    if sampler.get("steps"):
        drawn += f" with {sampler['steps']} steps"
    own = "each run sampled with its training seed"
    seeds = own if sampling["seed"] == OWN else f"sampling seed {sampling['seed']}"
    return f"{drawn}, guidance scale {guidance.get('scale')}, {seeds}"
