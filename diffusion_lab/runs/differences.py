"""Whether a run folder holds the run that is asked for."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.config_keys import FILES, REQUESTS, Means, Settings, flat, means
from diffusion_lab.build.overrides import values_of
from diffusion_lab.common import hashing
from diffusion_lab.first_stage.autoencoder import saving


def differences(saved: DictConfig, cfg: DictConfig) -> Iterator[tuple[str, object, object]]:
    """Yields (key, saved, requested) for each setting that makes `cfg` another run than `saved`.

    A missing key counts as null.
    """
    known, asked = (flat(OmegaConf.to_container(each, resolve=True)) for each in (saved, cfg))
    if saved.get("budget") and cfg.get("budget"):
        solved = values_of(saved.budget.solved or [])
        asked |= {key: value for key, value in solved.items() if key in asked}
    asked |= found_out(asked)
    for key in dict.fromkeys([*asked, *known]):
        if Means.IDENTITY not in means(key):
            continue
        if key in FILES and None not in (known.get(key), asked.get(key)):
            continue
        if key in REQUESTS and asked.get(key) == REQUESTS[key]:
            continue
        if known.get(key) != asked.get(key):
            yield key, known.get(key), asked.get(key)


def found_out(asked: Settings) -> Settings:
    """The values that a run would keep instead of requests, as far as the settings tell them."""
    found: Settings = {}
    size = asked.get("data.source.image_size")
    if isinstance(size, int):
        found["data.source.image_size"] = [size, size]
    if size is None and "data.source.resize" in asked:
        found["data.source.resize"] = "refuse"  # none needs it
    first_stage = Path(str(asked.get("first_stage.run"))) / saving.FIRST_STAGE_FILE
    if asked.get("first_stage.sha256") is None and first_stage.is_file():
        found["first_stage.sha256"] = hashing.of_file(first_stage)
    return found
