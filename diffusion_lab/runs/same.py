"""Whether a run folder holds the run that is asked for."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.overrides import values_of
from diffusion_lab.common import hashing
from diffusion_lab.first_stage.autoencoder import files
from diffusion_lab.runs.resuming import DATA
from diffusion_lab.runs.settings import CLASS, below, flat, with_defaults

# what may differ between two starts of one run: where it is trained, and how it is watched
INDIFFERENT = (
    *DATA,
    "run_dir",
    "resume",
    "logger",
    "compile",
    "channels_last",
    "micro_batch_size",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "first_stage.run",  # told by its sha256, as is what is at the path
    "first_stage.path",
    "first_stage.cache_dir",
    "metrics.cache_dir",
    "validate_every_n_steps",
    "trainer.log_every_n_steps",
    "callbacks.checkpoint",
    "callbacks.sample_grid",
    "callbacks.throughput",
    "callbacks.evaluation.every_n_steps",
    "callbacks.evaluation.batch_size",
    "budget.solved",
)
FILES = ("metrics.classifier",)  # whose checksums are in the names of figures
# what asks for a value to be found out, which the run then keeps in its place
INFERRED = {
    "data.source.image_size": None,
    "data.source.channels": None,
    "data.source.classes": None,
    "first_stage.sha256": None,
    "first_stage.scale": "measured",
}


def differences(
    saved: DictConfig, cfg: DictConfig, usual: DictConfig
) -> Iterator[tuple[str, object, object]]:
    """Keys that make two runs of it, with the saved value and the one asked for.

    A missing key counts as null. One that the saved run is older than counts as its constructor's
    default, or as it is in `usual`, the configuration without any override.
    """
    old, new, default = (OmegaConf.to_container(each, resolve=True) for each in (saved, cfg, usual))
    known = flat(completed(with_defaults(old), default, with_defaults(new)))
    asked = flat(with_defaults(new))
    if old.get("budget") and new.get("budget"):
        solved = values_of(old["budget"]["solved"] or [])
        asked |= {key: value for key, value in solved.items() if key in asked}
    asked |= found_out(asked)
    for key in dict.fromkeys([*flat(new), *flat(old), *asked, *known]):  # a class names the rest
        if below(key, INDIFFERENT):
            continue
        if key in FILES and None not in (known.get(key), asked.get(key)):
            continue
        if key in INFERRED and asked.get(key) == INFERRED[key]:
            continue
        if known.get(key) != asked.get(key):
            yield key, known.get(key), asked.get(key)


def completed(old: dict, usual: dict, asked: dict) -> dict:
    """A saved configuration with what is usual for those of the keys asked for that it lacks."""
    newer = {key: usual[key] for key in usual if key in asked and key not in old}
    return newer | {
        key: completed(value, usual[key], asked[key])
        if isinstance(value, dict)
        and all(
            isinstance(each.get(key), dict) and each[key].get(CLASS) == value.get(CLASS)
            for each in (usual, asked)
        )
        else value
        for key, value in old.items()
    }


def found_out(asked: dict[str, object]) -> dict[str, object]:
    """What a run would keep in place of some settings, as far as these say."""
    found, size = {}, asked.get("data.source.image_size")
    if isinstance(size, int):
        found["data.source.image_size"] = [size, size]
    if size is None and "data.source.resize" in asked:
        found["data.source.resize"] = "refuse"  # none needs it
    first_stage = Path(str(asked.get("first_stage.run"))) / files.FILE
    if asked.get("first_stage.sha256") is None and first_stage.is_file():
        found["first_stage.sha256"] = hashing.of_file(first_stage)
    return found
