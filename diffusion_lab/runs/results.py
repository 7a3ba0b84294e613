"""The evaluations kept in a run folder, each with its protocol, and which can be compared."""

import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.common import hashing
from diffusion_lab.common.files import read_json, write_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.quantity import FILE, FINGERPRINT, Protocol
from diffusion_lab.runs.averages import name_of
from diffusion_lab.runs.current import CHECKPOINT, CurrentWeights, file_stamp
from diffusion_lab.runs.files import is_record, load_record
from diffusion_lab.runs.summary import load_summary

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
    way = {part: OmegaConf.to_container(each, resolve=True) for part, each in way_of(cfg).items()}
    average, step = cfg.get("average"), cfg.get("step")
    weights = {} if average is None else {"average": name_of(average)}
    return way | {"seed": cfg.seed} | weights | ({} if step is None else {"step": step})


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
    """The sampler and guidance of a sampling, or of a configuration; a VAE's has none."""
    return {part: settings[part] for part in WAY if settings.get(part)}


def differing(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """The keys whose values differ; a missing value counts as null."""
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


# how an error describes each entry of a protocol, and what makes it equal: an override or advice
WORDS = {
    "extractor": ("with features of ", "give both the same metrics"),
    "extractor_fingerprint": ("with extractor weights ", "give both the same extractor"),
    "data": ("against data with the checksum ", "measure both on the same data"),
    "reference": ("with metrics.reference=", "metrics.reference="),
    "validation_images": ("with data.validation_size=", "train both with the same one"),
    "reference_file": ("against a file with the checksum ", "give both the same metrics.reference"),
    "reference_images": ("with metrics.reference_size=", "metrics.reference_size="),
    "num_samples": ("with metrics.num_samples=", "metrics.num_samples="),
}
EVALUATIONS = "evaluations"


def save_evaluation(
    folder: str | Path,
    metrics: dict[str, float],
    protocol: Protocol,
    cfg: DictConfig,
    weights: dict[str, object],
    extra: Sequence[dict[str, object]] = (),
) -> Path:
    """Writes the metrics of an evaluation into the run; repeating the evaluation replaces them.

    `weights` identifies the weights that were measured, and `extra` describes the quantities of
    metrics from outside the package.
    """
    facts = {"protocol": protocol, "sampling": sampling_of(cfg), CHECKPOINT: weights[CHECKPOINT]}
    key = json.dumps([facts, sorted(metrics)], sort_keys=True)
    path = Path(folder) / EVALUATIONS / f"{hashing.of_text(key)[:12]}.json"
    path.parent.mkdir(exist_ok=True)
    record = {"metrics": metrics, "extra_quantities": list(extra)}
    write_json(path, facts | weights | record)
    return path


# what the summary says of the evaluation at the end of training
OF_TRAINING = ("protocol", "sampling", "metrics", "sampling_seconds")


def evaluations_of(folder: str | Path, seed: int, weights: CurrentWeights) -> list[Record]:
    """All evaluations of a run's current weights, the one at the end of training first.

    `seed` is that of its training, which they are marked with.
    """
    summary, found = load_summary(folder), []
    # else its metrics are of earlier weights, or not of samples
    if summary.finished and summary.protocol and summary.sampling:
        found.append({key: getattr(summary, key) for key in OF_TRAINING})
        found += [{"protocol": summary.protocol, **each} for each in summary.at_other_steps]
    for path in sorted((Path(folder) / EVALUATIONS).glob("*.json")):
        record = read_json(path)
        if not record.get("metrics") or not is_record(record):
            raise UserError(f"{path} is damaged; delete it, and evaluate the run again")
        if weights.match(record):
            found.append(record)
    return [record | {"training_seed": seed} for record in found]


def metrics_by(found: Sequence[Record], protocol: Protocol, sampling: Sampling) -> dict[str, float]:
    """The metrics of the evaluations of this protocol and sampling; {} if there are none."""
    same, wanted = [], flat(sampling)
    for record in (each for each in found if each["protocol"] == protocol):
        ways = samplings_of(record)  # none of another program's images, which count for any
        if not ways or any(not differing(wanted, flat(way)) for way in ways):
            same.append(record["metrics"])
    return dict(ChainMap(*same))  # the first value of a metric counts


def require_evaluations(folder: str | Path) -> list[Record]:
    """All evaluations of a run's current weights.

    Raises UserError if there are none, or no run.
    """
    seed = load_record(folder).seed  # raises UserError if this is no run
    found = evaluations_of(folder, seed, CurrentWeights(folder))
    if not found:
        file_stamp(folder)  # without weights nothing can be measured
        raise never_evaluated(folder)
    return found


def never_evaluated(folder: str | Path, others: int = 0) -> UserError:
    """The error for a run that was never evaluated (and `others` more like it)."""
    return UserError(
        f"{folder} has no metrics of its current weights; measure it with "
        f"`diffusion-lab evaluate run={folder}`{_others(others)}"
    )


def comparable_metrics(
    folder: str | Path,
    found: list[Record],
    protocol: Protocol,
    sampling: Sampling,
    name: str | Path,
) -> dict[str, float]:
    """The metrics of a run's evaluations that have the protocol and sampling of the run `name`.

    `found` holds all evaluations of the run `folder`. If none of them matches, raises UserError,
    which names a difference.
    """
    if metrics := metrics_by(found, protocol, sampling):
        return metrics
    if not found:
        raise never_evaluated(folder)
    alike = [each for each in found if each["protocol"] == protocol]
    if not alike:
        require_same({str(name): protocol, str(folder): found[-1]["protocol"]})
    ours, theirs = flat(sampling), flat(samplings_of(alike[-1])[0])
    key = min(differing(ours, theirs))
    raise UserError(
        f"{folder} was sampled with {key}={theirs.get(key)}, {name} with "
        f"{key}={ours.get(key)}, so their metrics cannot be compared; "
        f"{_remedy(folder, ours, theirs)}"
    )


def require_same(protocols: dict[str, Protocol]) -> None:
    """Raises UserError, which names the first difference, if two runs' protocols are not equal."""
    (first, expected), (name, protocol) = protocols.items()
    for key in sorted(differing(expected, protocol), key=lambda key: (key not in WORDS, key)):
        if key == FINGERPRINT:
            continue
        a, b = expected.get(key), protocol.get(key)
        words, remedy = WORDS.get(key, (f"with {key}=", f"make {key} the same"))
        if a == FILE:  # a word for any file
            remedy = (
                "give both the same metrics.reference, and run `diffusion-lab evaluate` on both"
            )
        elif remedy.endswith("="):
            remedy = f"measure {name} with `diffusion-lab evaluate run={name} {remedy}{a}`"
        else:
            remedy += ", and run `diffusion-lab evaluate` on both"
        raise UserError(
            f"{first} was measured {words}{a}, {name} {words}{b}, so their metrics cannot be "
            f"compared; {remedy}"
        )


def _remedy(folder: str | Path, ours: dict[str, object], theirs: dict[str, object]) -> str:
    """The advice to evaluate a run, sampled with settings `theirs`, again with settings `ours`."""
    keys = differing(ours, theirs)
    command = f"diffusion-lab evaluate run={folder}"
    for key in keys:
        group = key.partition(".")[0]
        if group in WAY and ours.get(group) == OWN:
            return f"measure {folder} in its own way with `{command}`"
        if key.endswith("_target_") or key not in ours or key not in theirs:
            return f"measure both with the same {group}, as in `{command} {group}=...`"
    # Hydra's syntax for values: no blanks, and inf for infinity
    words = {key: json.dumps(ours[key], separators=(",", ":")) for key in keys}
    chosen = " ".join(f"{key}={word.replace('Infinity', 'inf')}" for key, word in words.items())
    return f"measure {folder} with `{command} {chosen}`"


def common_metrics(
    records: dict[Path, list[Record]],
) -> tuple[Protocol, Sampling, dict[Path, dict[str, float]]]:
    """Finds a protocol and sampling that all runs share; returns both, and the metrics by folder.

    If there are several, it takes the one with most samples. If there is none, it raises
    UserError, which names a difference. Sampling seeds are shared, too, if each is its run's
    training seed.
    """
    everything = [record for found in records.values() for record in found]
    pairs = [[record["protocol"], way] for record in everything for way in samplings_of(record)]
    # if no sampling is known, all are images of other programs
    pairs = pairs or [[record["protocol"], record["sampling"]] for record in everything]
    having = {  # the runs, by protocol and sampling
        text: [folder for folder, found in records.items() if metrics_by(found, *json.loads(text))]
        for text in dict.fromkeys(json.dumps(pair, sort_keys=True) for pair in pairs)
    }
    if not having:
        raise never_evaluated(next(iter(records)), len(records) - 1)

    def fitness(way: str) -> tuple[int, int, bool]:
        measured = json.loads(way)[0]
        by_training = measured.get("reference") != "validation"
        return len(having[way]), measured["num_samples"], by_training

    # the most common pair, so that the error names the odd run out; of those, most samples
    best = max(having, key=fitness)
    protocol, sampling = json.loads(best)
    metrics, refused = {}, []
    for folder, found in records.items():
        try:
            metrics[folder] = comparable_metrics(folder, found, protocol, sampling, having[best][0])
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError(refused[0] + _others(len(refused) - 1))
    return protocol, sampling, metrics


def _others(count: int) -> str:
    runs = "run needs" if count == 1 else "runs need"
    return f"; {count} other {runs} the same" if count else ""
