"""The settings that make a run's composition, and those that do not."""

import inspect
import json
from functools import cache

from hydra.utils import get_object
from omegaconf import OmegaConf

from diffusion_lab.comparison.candidates import Run
from diffusion_lab.kept_figures import flat

CLASS = "_target_"
FRACTION = "data.fraction"
# What may differ between runs of one composition: where it ran, what it was called, how it was
# watched, and the budget that its size and length follow from. Sampling is here as all runs are
# measured with one, whatever they would have chosen.
ASIDE = (
    "seed",
    "name",
    "study_name",
    "budget",
    "optimized_metric",
    "run_dir",
    "resume",
    "logger",
    "metrics",
    "sampler",
    "guidance",
    "compile",
    "channels_last",
    "micro_batch_size",
    "activation_checkpointing",
    "validate_every_n_steps",
    "callbacks.checkpoint",
    "callbacks.sample_grid",
    "callbacks.evaluation",
    "callbacks.pruning",
    "callbacks.throughput",
    "data.root",
    "data.path",
    "data.test_path",
    "data.on_device",
    "data.validation_size",
    "first_stage.run",
    "first_stage.path",  # of a run's own copy; what it is, is its sha256
    "first_stage.cache",
    "first_stage.cache_dir",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.log_every_n_steps",
    "trainer.deterministic",
)
DATA_SIZE = (FRACTION, "data.per_class")
# what makes a held-out loss the quantity that it is, apart from what is only trained with
OF_THE_LOSS = ("objective.", "schedule.", "first_stage.", "data.")
NOT_OF_THE_LOSS = (*DATA_SIZE, "data.subset_seed", "data.flip")
PLAIN = (bool, int, float, str)
Settings = dict[str, object]  # dotted key -> plain value


def settings_of(run: Run) -> Settings:
    """What makes a run's composition; null is left out, as a run may be older than a key."""
    plain = flat(with_defaults(OmegaConf.to_container(run.config)))
    if plain.get(FRACTION) is None:
        plain[FRACTION] = 1.0  # null is all of the data, too
    return {
        key: value
        for key, value in plain.items()
        if value is not None and not any(key == a or key.startswith(f"{a}.") for a in ASIDE)
    }


def with_defaults(plain: object) -> object:
    """A configuration with the constructors' defaults of keys that a run is older than."""
    if not isinstance(plain, dict):
        return plain
    filled = {key: with_defaults(value) for key, value in plain.items()}
    return defaults_of(str(plain[CLASS])) | filled if CLASS in plain else filled


@cache
def defaults_of(target: str) -> Settings:
    """The plain defaults of a class by its name, none if it is not here."""
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except Exception:  # somebody's network, whose file may do anything when it is imported
        return {}
    return {each.name: each.default for each in parameters if isinstance(each.default, PLAIN)}


def losses_compare(runs: list[Run]) -> bool:
    """Whether the held-out losses of all runs are one quantity."""
    kinds = set()
    for run in runs:
        plain = flat(with_defaults(OmegaConf.to_container(run.config)))
        kept = {
            key: value
            for key, value in plain.items()
            if value is not None
            and key.startswith(OF_THE_LOSS)
            and key not in NOT_OF_THE_LOSS
            and (key not in ASIDE or key == "data.validation_size")
        }
        kinds.add(json.dumps(kept, sort_keys=True))
    return len(kinds) == 1
