"""The one table of configuration keys, which says what it means to change the value of a key."""

import re
from collections.abc import Mapping, Sequence
from enum import Flag, auto
from functools import reduce
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from diffusion_lab.common.messages import UserError

CLASS = "_target_"
FRACTION, PER_CLASS, SUBSET_SEED = "data.fraction", "data.per_class", "data.subset_seed"
# groups whose option none is null
CAN_BE_NONE = ("alignment", "augmentation", "budget", "coupling", "logger")
DATA_SIZE = (FRACTION, PER_CLASS)
OF_LOGGERS = ("project", "experiment", "name", "group", "run_id")
WORDS = {  # other keys whose values are texts
    *("name", "study_name", "data_sha256", "init_sha256"),
    *(f"logger.{each}.{key}" for each in ("wandb", "mlflow", "trackio") for key in OF_LOGGERS),
}
Settings = dict[str, object]  # dotted key -> plain value


class Means(Flag):
    """The properties of a configuration key."""

    RESUMABLE = auto()  # a run that is resumed may take another value
    IDENTITY = auto()  # a different value makes a different run
    NAMED = auto()  # a study names its runs by values that the command line gives
    LOSS = auto()  # a different value changes what the validation and test losses measure
    COMPOSITION = auto()  # a different value makes a different composition to `compare`
    COST = auto()  # decides what a model costs
    PATH = auto()  # a file or folder


# The keys of each set of properties. A key that ends in a dot stands for all keys below it, and for
# the option of that group unless the group is listed itself. The longest match counts.
TABLE = {
    "": (
        "hparams_search compile channels_last budget.solved tuning tuning. arm protocol "
        "protocol.seeds choices. gpu. kind. loss_facts. first_stage_seconds"
    ),
    "identity": "name study_name optimized_metric data_sha256 init_images init_flops budget.",
    "identity composition": "trainer init_sha256",  # the option trainer says where a run is trained
    "identity named": "seed data.on_device first_stage.cache metrics.",
    "identity named composition": (
        "alignment. batch_size data.fraction data.per_class data.subset_seed data.flip "
        "lr_schedule. autoencoder."
    ),
    "identity named loss": "data.validate_on",
    # an experiment may choose any of the other keys
    "identity named loss composition": "experiment data. coupling. reconstruction.",
    "identity named loss composition cost": (
        "family first_stage. schedule. objective. denoiser.clip"  # clipped errors are lower
    ),
    "identity named composition cost": (
        "augmentation. backbone. conditioning. denoiser. optimizer. parameter_groups"
    ),
    "identity named cost": "sampler. guidance.",
    "resumable identity named composition": "trainer. callbacks. matmul_precision",
    "resumable identity named": (
        "activation_checkpointing trainer.deterministic callbacks.evaluation. callbacks.pruning."
    ),
    "resumable": (
        "logger. micro_batch_size validate_every_n_steps trainer.accelerator trainer.devices "
        "trainer.num_nodes trainer.strategy. trainer.log_every_n_steps trainer.benchmark "
        "callbacks.checkpoint. callbacks.sample_grid. callbacks.denoising. callbacks.throughput. "
        "callbacks.level_losses. callbacks.statistics. callbacks.operator_profile. "
        "callbacks.evaluation.every_n_steps "
        "callbacks.weight_averaging.also callbacks.posthoc_ema. callbacks.evaluation.batch_size "
        "data.source.store"
    ),
    "resumable path": "data.source.root data.source.store_dir",
    "resumable named loss path": "data.source.path data.source.test_path",
    "path": (
        "run_dir resume run images control output data_root first_stage.cache_dir "
        "metrics.cache_dir objective.teacher.cache_dir"
    ),
    "named path": "init_from objective.teacher.run",  # identified by checksums
    "named loss path": "first_stage.run first_stage.path",  # identified by checksums
    "identity named path": (
        "metrics.classifier metrics.extractor.path metrics.extractor.weights_path "
        "alignment.extractor.weights_path"
    ),
    "identity named cost path": "guidance.weak_run guidance.classifier",
}
KEYS = {
    key: reduce(Means.__or__, (Means[word.upper()] for word in words.split()), Means(0))
    for words, keys in TABLE.items()
    for key in keys.split()
}
UNKNOWN = Means.IDENTITY | Means.NAMED | Means.COMPOSITION  # keys of classes of other packages


def row_of(key: str) -> str | None:
    """The row of the table for a dotted key, or for a group, which stands for its option."""
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
    """Whether a resumed run may take another value of a key; options of groups never change."""
    return Means.RESUMABLE in means(key) and ("." in key or f"{key}." not in KEYS)


def groups(meaning: Means) -> tuple[str, ...]:
    """The top-level groups of the configuration that have this property."""
    found = (key[:-1] for key in KEYS if key.endswith(".") and meaning in KEYS[key])
    return tuple(group for group in found if "." not in group)


def flat(plain: object, name: str = "") -> Settings:
    """Flattens nested plain values to dotted names; an empty dictionary counts as a value."""
    if not isinstance(plain, dict) or (name and not plain):
        return {name: plain}
    return {
        key: value
        for part, inner in plain.items()
        for key, value in flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def as_list(value: object) -> list[Any]:
    """A value, or each of a list of them, in a list; null is none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | ListConfig) else [value]


def as_path(key: str, value: object) -> object:
    """The value of a key, as text if it is a path or a name: Hydra reads 2024 as a number.

    Raises UserError for true and false, lists and mappings, which are neither.
    """
    if value is None or isinstance(value, str) or not (Means.PATH in means(key) or key in WORDS):
        return value
    if isinstance(value, bool):
        word = str(value).lower()
        if key in WORDS:
            raise UserError(f"{key}={word} is no name; write {key}=\"'{word}'\"")
        raise UserError(f"{key}={word} is no path; write {key}=./{word}")
    if not isinstance(value, int | float):
        if key.startswith("data.source."):  # of a source of the user's, maybe
            return value
        raise UserError(f"{key}={value} must be {'a name' if key in WORDS else 'a path'}")
    return str(value)


def check_boxes(cfg: DictConfig) -> None:
    """Raises UserError for a key with keys below it that was given a single value instead.

    A group that a command or a family does not have is null. What tuning must name, it says itself.
    """
    boxes = {key: cfg[key] for key in map(str, cfg) if f"{key}." in KEYS and key != "tuning"}
    boxes |= {f"logger.{name}": each for name, each in (cfg.get("logger") or {}).items()}
    for key, value in boxes.items():
        if not isinstance(value, DictConfig) and (value is not None or "." in key):
            raise replaced(key, value)


def replaced(key: str, value: object) -> UserError:
    """The error for a single value of a key with keys below it."""
    shown = "null" if value is None else value
    return UserError(
        f"{key}={shown} would replace all keys below {key}; write them, as in {key}.KEY=VALUE"
    )


def updated(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """A copy of a configuration with these values of its keys."""
    cfg = cfg.copy()
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def verbatim(value: object) -> Any:
    """A plain value whose texts OmegaConf keeps as they are, if they are of files or other people.

    It would read ${oc.env:HOME}, as the name of a class or of a file, as that variable.
    """
    if isinstance(value, Mapping):
        return {key: verbatim(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [verbatim(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def leave_out(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
    """Removes the values that a study or an experiment gives for groups of which none is chosen.

    What names a class stays: it is not of a group. Steps of a sampler that has none go, too, unless
    they are among the command line's `overrides`. `choices` are Hydra's, by group; changes `cfg` in
    place.
    """
    given = any(override.lstrip("+").startswith("sampler.steps=") for override in overrides)
    for override in overrides:
        group, _, options = override.lstrip("+").partition("=[")
        if group in CAN_BE_NONE and "none" in map(str.strip, options.rstrip("]").split(",")):
            raise UserError(f"{override}: leave none out, or write {group}=none")
    with open_dict(cfg):
        for group, option in choices.items():
            if group not in cfg or CLASS in (cfg[group] or {}):
                continue
            if option == "none" and group in CAN_BE_NONE:
                cfg[group] = None
            elif option is None:
                for override in overrides:
                    if override.lstrip("+").startswith(f"{group}."):
                        raise UserError(f"{override}: no {group} is chosen; leave it out")
                del cfg[group]
        # of a callback that an experiment leaves out, whose values another file still gives
        for name, settings in cfg.get("callbacks", {}).items():
            if isinstance(settings, DictConfig) and CLASS not in settings:
                for override in () if cfg.get("resume") else overrides:  # else of the run's own
                    if override.lstrip("+").startswith(f"callbacks.{name}."):
                        raise UserError(f"{override}: callbacks.{name} is null; leave it out")
                cfg.callbacks[name] = None
        if choices.get("sampler") == "codes" and not given:
            cfg.sampler.pop("steps", None)


def paths_as_text(cfg: DictConfig) -> None:
    """Turns all paths in a configuration into text, in place."""
    for key, value in flat(OmegaConf.to_container(cfg)).items():
        if as_path(key, value) is not value:
            OmegaConf.update(cfg, key, as_path(key, value))


def flattered(trained: DictConfig, metrics: DictConfig | None) -> bool:
    """Whether metrics see images by the network to whose features a run was aligned."""
    network = OmegaConf.select(trained, "alignment.extractor._target_")
    judge = metrics and OmegaConf.select(metrics, "extractor._target_")
    return network is not None and network == judge
