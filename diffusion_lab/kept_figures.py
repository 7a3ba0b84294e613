"""The figures that a run folder keeps, each with its protocol, and which of two may be compared."""

import hashlib
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.errors import UserError
from diffusion_lab.files import write_atomically
from diffusion_lab.metrics.protocol import Protocol, require_same
from diffusion_lab.runs import load_config, load_summary
from diffusion_lab.weights import fingerprint

EVALUATIONS = "evaluations"


def sampling_of(cfg: DictConfig) -> dict[str, object]:
    """How samples are drawn: sampler, guidance and seed, as plain values."""
    parts = [part for part in ("sampler", "guidance") if part in cfg]  # a prior has neither
    plain = {part: OmegaConf.to_container(cfg[part], resolve=True) for part in parts}
    return plain | {"seed": cfg.seed}


def keep(
    folder: str | Path, figures: dict[str, float], protocol: Protocol, cfg: DictConfig
) -> Path:
    """Writes what `evaluate` measured into the run; the same evaluation again replaces it."""
    facts = {
        "protocol": protocol,
        "sampling": sampling_of(cfg),
        "checkpoint": fingerprint(folder),
    }
    key = json.dumps([facts, sorted(figures)], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = Path(folder) / EVALUATIONS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(facts | {"metrics": figures}, indent=2) + "\n")
    return path


def kept(folder: str | Path) -> list[dict]:
    """What was measured of a run's present weights: protocol, sampling and metrics.

    Raises UserError where there is no run, or nothing was measured.
    """
    saved, summary = load_config(folder), load_summary(folder)
    checkpoint, found = fingerprint(folder), []
    # its own, at the end of training; an autoencoder's are of reconstructions
    if summary.get("protocol") and "autoencoder" not in saved:
        sampling = sampling_of(OmegaConf.merge(saved, {"seed": saved.callbacks.evaluation.seed}))
        facts = {"protocol": summary["protocol"], "metrics": summary["metrics"]}
        found.append(facts | {"sampling": sampling, "checkpoint": checkpoint})
    for path in sorted((Path(folder) / EVALUATIONS).glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"{path} is damaged; delete it, and evaluate the run again") from error
    found = [each for each in found if each.get("checkpoint") == checkpoint]
    if not found:
        raise UserError(f"{folder} has no figures of its weights; {remedy(folder)}")
    return found


def remedy(folder: str | Path) -> str:
    """How a run gets figures."""
    return f"measure it by `diffusion-lab evaluate run={folder}`"


def comparable(
    folder: str | Path, found: list[dict], protocol: Protocol, cfg: DictConfig, name: str
) -> dict[str, float]:
    """Of what another run keeps, the figures measured, and sampled, as those of the run `name`.

    Raises UserError, naming what differs, if there are none.
    """
    alike = [each for each in found if each["protocol"] == protocol]
    if not alike:
        require_same({str(name): protocol, str(folder): found[-1]["protocol"]})
    same = [each["metrics"] for each in alike if each["sampling"] == sampling_of(cfg)]
    if same:  # another time other figures may have been asked for, as those of each class
        return {name: value for metrics in same for name, value in metrics.items()}
    raise UserError(
        f"{folder} was measured with another sampler, guidance or seed than {name} is to be; "
        f"{remedy(folder)} with those of {name}"
    )
