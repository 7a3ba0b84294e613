"""How samples were drawn, as records of evaluations keep it, and which ways count as equal."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.config_keys import flat
from diffusion_lab.runs.averages import name_of

WAY = ("sampler", "guidance")  # parts of a configuration by which samples are drawn
Sampling = dict[str, object]  # the result of `sampling_of`
IMAGES = "images"  # the key of images that another program drew, in configurations
# the sampling seed of runs that each sample with their training seed, and the sampler and guidance
# of runs that are each drawn in the way of their own configuration
OWN = "own"
OWN_WAY = "own_way"  # entry of a record that may be compared with records of other ways
# "protocol", "sampling" and "metrics" of an evaluation, the run's "training_seed", and what
# identifies its weights
Record = dict[str, Any]


def sampling_of(cfg: DictConfig) -> Sampling:
    """The settings by which samples are drawn: sampler, guidance and seed, as plain values.

    The average of the weights is one of them, unless it is the one that the run evaluates, and so
    is the step of a checkpoint other than the newest. Those of another program's images are not
    known: {}.
    """
    if cfg.get(IMAGES):
        return {}
    parts = [part for part in WAY if cfg.get(part)]  # a VAE's has neither
    plain = {part: OmegaConf.to_container(cfg[part], resolve=True) for part in parts}
    average, step = cfg.get("average"), cfg.get("step")
    weights = {} if average is None else {"average": name_of(average)}
    return plain | {"seed": cfg.seed} | weights | ({} if step is None else {"step": step})


def samplings_of(record: Record) -> list[Sampling]:
    """The sampling of an evaluation, and, if it has the run's training seed, with the seed OWN.

    Sampler and guidance are OWN if the record has an `own_way`, and was drawn in it. Another
    program's images have no sampling.
    """
    sampling = record["sampling"]
    if not sampling:
        return []
    if OWN_WAY in record and way_of(sampling) == record[OWN_WAY]:
        sampling = sampling | dict.fromkeys(WAY, OWN)
    own = sampling["seed"] == record["training_seed"]
    return [sampling, sampling | {"seed": OWN}] if own else [sampling]


def way_of(settings: Mapping[str, Any]) -> Sampling:
    """The sampler and guidance of a sampling, or of a plain configuration; a GAN has none."""
    return {part: settings[part] for part in WAY if settings.get(part)}


def sampled_by(record: Record, sampling: Sampling) -> bool:
    """Whether an evaluation is of this sampling; one of another program's images is of any."""
    ways = [flat(way) for way in samplings_of(record)]
    return not ways or any(not differing(flat(sampling), way) for way in ways)


def differing(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """The keys whose values differ; a missing value counts as null."""
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
