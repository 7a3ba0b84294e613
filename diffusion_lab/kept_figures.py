"""The figures that a run folder keeps, each with its protocol, and which of two may be compared."""

import hashlib
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.errors import UserError
from diffusion_lab.files import write_atomically
from diffusion_lab.metrics.protocol import Protocol, require_same
from diffusion_lab.runs import load_config, load_summary

EVALUATIONS = "evaluations"


def keep(
    folder: str | Path, figures: dict[str, float], protocol: Protocol, cfg: DictConfig
) -> Path:
    """Writes what `evaluate` measured into the run; the same evaluation again replaces it."""
    sampling = {
        part: OmegaConf.to_container(cfg[part], resolve=True)
        for part in ("sampler", "guidance")
        if part in cfg  # not of a prior
    }
    content = {"protocol": protocol, **sampling, "seed": cfg.seed}
    key = json.dumps([content, sorted(figures)], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = Path(folder) / EVALUATIONS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(content | {"metrics": figures}, indent=2) + "\n")
    return path


def kept(folder: str | Path) -> list[dict]:
    """What was measured of a run, at its end and by `evaluate`: protocol, metrics and more."""
    load_config(folder)  # says if it is no run
    found = [load_summary(folder)]
    for path in sorted((Path(folder) / EVALUATIONS).glob("*.json")):
        found.append(json.loads(path.read_text()))
    return [each for each in found if each.get("protocol")]


def comparable(folder: str | Path, protocol: Protocol, name: str) -> dict[str, float]:
    """The figures of another run that were measured as those of the run `name`.

    Raises UserError, naming what differs, if there are none.
    """
    found = kept(folder)
    if not found:
        raise UserError(
            f"{folder} has no figures yet; measure it by `diffusion-lab evaluate run={folder}`"
        )
    for each in found:
        if each["protocol"] == protocol:
            return each["metrics"]
    require_same({str(name): protocol, str(folder): found[-1]["protocol"]})
    return {}
