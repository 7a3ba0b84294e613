"""The figures that a run folder keeps, each with its protocol, and which of two may be compared."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.common.errors import UserError
from diffusion_lab.common.files import write_atomically
from diffusion_lab.metrics.protocol import Protocol, require_same
from diffusion_lab.runs.config import load_config
from diffusion_lab.runs.folder import load_summary
from diffusion_lab.runs.settings import Settings, flat
from diffusion_lab.runs.weights import CHECKPOINT, Present, stamp

EVALUATIONS = "evaluations"
Sampling = dict[str, object]  # as `sampling_of` says it
# "protocol", "sampling" and "metrics" of an evaluation, and of which weights it is
Record = dict[str, dict]


def sampling_of(cfg: DictConfig) -> Sampling:
    """How samples are drawn: sampler, guidance and seed, as plain values."""
    parts = [part for part in ("sampler", "guidance") if part in cfg]  # a prior has neither
    plain = {part: OmegaConf.to_container(cfg[part], resolve=True) for part in parts}
    return plain | {"seed": cfg.seed}


def known(sampling: Sampling) -> Settings:
    """What is set of it: a key that is null is one that older runs lack."""
    return {key: value for key, value in flat(sampling).items() if value is not None}


def keep(
    folder: str | Path,
    figures: dict[str, float],
    protocol: Protocol,
    cfg: DictConfig,
    weights: dict[str, object],
) -> Path:
    """Writes what `evaluate` measured into the run; the same evaluation again replaces it.

    `weights` is the `identity` of those that were measured.
    """
    facts = {
        "protocol": protocol,
        "sampling": sampling_of(cfg),
        CHECKPOINT: weights[CHECKPOINT],
    }
    key = json.dumps([facts, sorted(figures)], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = Path(folder) / EVALUATIONS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(facts | weights | {"metrics": figures}, indent=2) + "\n")
    return path


def kept(folder: str | Path, saved: DictConfig, present: Present) -> list[Record]:
    """What was measured of the present weights of a run of configuration `saved`."""
    summary, found = load_summary(folder), []
    # its own, at the end of training; an autoencoder's are of reconstructions
    if summary.get("protocol") and "autoencoder" not in saved:
        sampling = sampling_of(OmegaConf.merge(saved, {"seed": saved.callbacks.evaluation.seed}))
        facts = {"protocol": summary["protocol"], "metrics": summary["metrics"]}
        found.append(facts | {"sampling": sampling})
    for path in sorted((Path(folder) / EVALUATIONS).glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged; delete it, and evaluate the run again") from error
        if present.are_those_of(record):
            found.append(record)
    return found


def measured(folder: str | Path) -> list[Record]:
    """What was measured of a run's present weights; raises UserError if nothing was, or no run."""
    found = kept(folder, load_config(folder), Present(folder))
    if not found:
        stamp(folder)  # without weights nothing can be measured
        raise unmeasured(folder)
    return found


def unmeasured(folder: str | Path, others: int = 0) -> UserError:
    """That a run, and as many others, have no figures."""
    return UserError(
        f"{folder} has no figures of its weights; measure it by "
        f"`diffusion-lab evaluate run={folder}`{_others(others)}"
    )


def comparable(
    folder: str | Path,
    found: list[Record],
    protocol: Protocol,
    sampling: Sampling,
    name: str | Path,
) -> dict[str, float]:
    """Those figures of a run, of all `found` in it, that were measured as those of the run `name`.

    Raises UserError, naming what differs, if there are none.
    """
    if not found:
        raise unmeasured(folder)
    alike = [each for each in found if each["protocol"] == protocol]
    if not alike:
        require_same({str(name): protocol, str(folder): found[-1]["protocol"]})
    figures: dict[str, float] = {}
    for each in alike:
        if known(each["sampling"]) == known(sampling):
            figures = each["metrics"] | figures  # of two that say the same, the run's own
    if not figures:
        ours, theirs = flat(sampling), flat(alike[-1]["sampling"])
        key = min(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        raise UserError(
            f"{folder} was sampled with {key}={theirs.get(key)}, {name} with "
            f"{key}={ours.get(key)}, and such figures cannot be compared; "
            f"{remedy_of(folder, ours, theirs)}"
        )
    return figures


def remedy_of(folder: str | Path, ours: dict[str, object], theirs: dict[str, object]) -> str:
    """The command that samples a run, sampled as `theirs`, as `ours`."""
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    command = f"diffusion-lab evaluate run={folder}"
    for key in differing:
        group = key.partition(".")[0]
        if key.endswith("_target_") or key not in ours or key not in theirs:
            return f"measure both with one choice of it, as in `{command} {group}=...`"
    # as Hydra reads values: without blanks, and infinity in its own word
    words = {key: json.dumps(ours[key], separators=(",", ":")) for key in differing}
    chosen = " ".join(f"{key}={word.replace('Infinity', 'inf')}" for key, word in words.items())
    return f"measure it by `{command} {chosen}`"


def measured_alike(
    records: dict[Path, list[Record]],
) -> tuple[Protocol, Sampling, dict[Path, dict[str, float]]]:
    """The one protocol and sampling in which all runs, by folder, were measured, and their figures.

    Of several, that of most samples. Raises UserError, naming a difference, if there is none.
    """
    ways = {way_of(each): each for found in records.values() for each in found}
    if not ways:
        raise unmeasured(next(iter(records)), len(records) - 1)
    counts = Counter(way for found in records.values() for way in {way_of(each) for each in found})
    # the most common way, so that a difference is named of the odd run out; else of most samples
    chosen = max(ways, key=lambda way: (counts[way], ways[way]["protocol"]["num_samples"]))
    protocol, sampling = ways[chosen]["protocol"], ways[chosen]["sampling"]
    so_measured = next(
        folder for folder, found in records.items() if chosen in (way_of(each) for each in found)
    )
    figures, refused = {}, []
    for folder, found in records.items():
        try:
            figures[folder] = comparable(folder, found, protocol, sampling, so_measured)
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError(refused[0] + _others(len(refused) - 1))
    return protocol, sampling, figures


def way_of(record: Record) -> str:
    """Protocol and sampling of an evaluation, as one word."""
    return json.dumps([record["protocol"], known(record["sampling"])], sort_keys=True)


def _others(count: int) -> str:
    runs = "run needs" if count == 1 else "runs need"
    return f"; {count} other {runs} the like" if count else ""
