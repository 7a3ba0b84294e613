"""The one table of configuration keys, which says what another value of a key means."""

from enum import Flag, auto
from functools import reduce

from omegaconf import DictConfig, OmegaConf

CLASS = "_target_"
FRACTION, SUBSET_SEED = "data.fraction", "data.subset_seed"
DATA_SIZE = (FRACTION, "data.per_class")
Settings = dict[str, object]  # dotted key -> plain value


class Means(Flag):
    """The properties of a configuration key."""

    NOTHING = 0
    RESUMABLE = auto()  # a run that is resumed may take another value
    IDENTITY = auto()  # another value makes another run
    NAMED = auto()  # a study names its runs by values that the command line gives
    LOSS = auto()  # another value makes the held-out loss another quantity
    COMPOSITION = auto()  # another value makes another composition to `compare`
    COST = auto()  # decides what a model costs
    PATH = auto()  # a file or folder


# A key that ends in a dot stands for all keys in it, and for the option of the group unless that
# has a row of its own. The longest row counts.
TABLE = {
    "name": "identity",
    "seed": "identity named",
    "study_name": "identity",
    "run_dir": "path",
    "resume": "path",
    "run": "path",
    "output": "path",
    "data_root": "path",
    "experiment": "identity named loss composition",  # chooses any of the others
    "hparams_search": "",
    "batch_size": "identity named composition",
    "micro_batch_size": "resumable",
    "validate_every_n_steps": "resumable",
    "compile": "",
    "channels_last": "",
    "activation_checkpointing": "resumable identity named",
    "optimized_metric": "identity",
    "budget.": "identity",
    "budget.solved": "",
    "data.": "identity named loss composition",
    "data.source.root": "resumable path",
    "data.source.path": "resumable named loss path",
    "data.source.test_path": "resumable named loss path",
    "data.fraction": "identity named composition",
    "data.per_class": "identity named composition",
    "data.subset_seed": "identity named composition",
    "data.flip": "identity named composition",
    "data.on_device": "identity named",
    "data.validation_size": "identity named loss",
    "first_stage.": "identity named loss composition cost",
    "first_stage.run": "named loss path",  # told by its sha256, as the autoencoder at a path is
    "first_stage.path": "named loss path",
    "first_stage.cache": "identity named",
    "first_stage.cache_dir": "path",
    "augmentation.": "identity named composition cost",
    "backbone.": "identity named composition cost",
    "conditioning.": "identity named composition cost",
    "schedule.": "identity named loss composition cost",
    "objective.": "identity named loss composition cost",
    "denoiser.": "identity named composition cost",
    "optimizer.": "identity named composition cost",
    "lr_schedule.": "identity named composition",
    "autoencoder.": "identity named composition",
    "reconstruction.": "identity named loss composition",
    "sampler.": "identity named cost",
    "guidance.": "identity named cost",
    "guidance.weak_run": "identity named cost path",
    "metrics.": "identity named",
    "metrics.cache_dir": "path",
    "metrics.classifier": "identity named path",
    "metrics.extractor.path": "identity named path",
    "metrics.extractor.weights_path": "identity named path",
    "trainer": "identity composition",  # an option says where a run is trained
    "trainer.": "resumable identity named composition",
    "trainer.accelerator": "resumable",
    "trainer.devices": "resumable",
    "trainer.num_nodes": "resumable",
    "trainer.strategy.": "resumable",
    "trainer.log_every_n_steps": "resumable",
    "trainer.deterministic": "resumable identity named",
    "logger.": "resumable",
    "callbacks.": "resumable identity named composition",
    "callbacks.checkpoint.": "resumable",
    "callbacks.sample_grid.": "resumable",
    "callbacks.throughput.": "resumable",
    "callbacks.evaluation.": "resumable identity named",
    "callbacks.evaluation.every_n_steps": "resumable",
    "callbacks.evaluation.batch_size": "resumable",
    "callbacks.pruning.": "resumable identity named",
}
KEYS = {
    key: reduce(Means.__or__, (Means[word.upper()] for word in words.split()), Means.NOTHING)
    for key, words in TABLE.items()
}
UNKNOWN = Means.IDENTITY | Means.NAMED | Means.COMPOSITION  # keys of classes from elsewhere
# Files whose checksums are in the names of metrics, so that their places do not matter.
FILES = ("metrics.classifier",)
# The values that ask a run to find another one out, which it then keeps.
REQUESTS = {
    "data.source.image_size": None,
    "data.source.channels": None,
    "data.source.classes": None,
    "first_stage.sha256": None,
    "first_stage.scale": "measured",
}


def row_of(key: str) -> str | None:
    """The row of the table for a dotted key, or for a group, by which its option is meant."""
    if key in KEYS:
        return key
    parts = key.split(".")
    rows = (".".join(parts[:count]) + "." for count in range(len(parts), 0, -1))
    return next((row for row in rows if row in KEYS), None)


def means(key: str) -> Means:
    """The properties of a dotted key, or of a group's option."""
    row = row_of(key.replace("/", "."))
    return UNKNOWN if row is None else KEYS[row]


def is_resumable(key: str) -> bool:
    """Whether a resumed run may take another value of a key; an option of a group is no value."""
    return Means.RESUMABLE in means(key) and ("." in key or f"{key}." not in KEYS)


def groups(meaning: Means) -> tuple[str, ...]:
    """The groups at the top of the configuration that have this property."""
    found = (key[:-1] for key in KEYS if key.endswith(".") and meaning in KEYS[key])
    return tuple(group for group in found if "." not in group)


def flat(plain: object, name: str = "") -> Settings:
    """Nested plain values by their dotted names; an empty dictionary is a value itself."""
    if not isinstance(plain, dict) or (name and not plain):
        return {name: plain}
    return {
        key: value
        for part, inner in plain.items()
        for key, value in flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def as_path(key: str, value: object) -> object:
    """The value of a key, as text if it is a path: Hydra takes a folder 2024 for a number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number and Means.PATH in means(key) else value


def paths_as_text(cfg: DictConfig) -> None:
    """Makes all paths in a configuration texts."""
    for key, value in flat(OmegaConf.to_container(cfg)).items():
        if as_path(key, value) is not value:
            OmegaConf.update(cfg, key, as_path(key, value))
