"""The runs of a study: their protocol, the folder of each, and whether it is new or finished.

outputs/<study_name>/<what differs>/ is a run folder. A run's state is read from its folder alone,
so a repeated command resumes the run, whatever process it runs in.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import Means, flat, is_resumable, means
from diffusion_lab.assembly.instantiate import check_keys, target_of
from diffusion_lab.assembly.sentences import key_of, parse
from diffusion_lab.common import hashing
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.formats import joined
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import FOLDER, Range, one_of, whole_list
from diffusion_lab.compute import launch
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.compute.started import in_launched_process
from diffusion_lab.metrics.metric import Metric, described
from diffusion_lab.metrics.quantity import (
    OF_SAMPLES,
    ON_REQUEST,
    QUANTITIES,
    Quantity,
    higher_is_better,
)
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.folder import ABANDONED, load_config
from diffusion_lab.runs.progress import has_locks, require_unlocked
from diffusion_lab.runs.resuming import INSTEAD_OF_OPTIONS, differences
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.training.callbacks import MedianPruning, SampleEvaluation, configured

# metrics that are measured where a key of `metrics` is given, each with that key and a value
ON_KEYS = {name: f"{name}=true" for name in ON_REQUEST}
ON_KEYS |= dict.fromkeys(("accuracy", "classifier_fid"), "classifier=...")
ON_KEYS |= {"seams": "patch=4", "fid_class": "per_class=true"}
OPTIONAL = {"test", "sampling", "contrasts", "sampling_seeds"}  # keys that have defaults
TESTS = ("joint", "welch", "paired")  # of `compare`
TEXT = Range("a text", lambda value: isinstance(value, str) and bool(value))

# The question of a study, the one metric that decides, such as fid, the seeds, when no more runs
# are made, and the test. With `sampling` own each composition may be drawn by its own sampler and
# guidance; else they have to be equal. `contrasts` are the pairs of arms that are asked about.
PROTOCOL = {
    "question": TEXT,
    "metric": one_of(*(quantity.name for quantity in QUANTITIES if quantity.judged)),
    "seeds": whole_list(0, shortest=2),
    "stop": TEXT,
    "test": one_of(*TESTS),
    "sampling": one_of("equal", "own"),
}


def check_protocol(cfg: DictConfig) -> None:
    """Raises UserError for a wrong protocol, or if the run would not measure its metric."""
    node, names = cfg.get("protocol"), [*PROTOCOL, "contrasts", "sampling_seeds"]
    if node is None:
        return
    if not isinstance(node, DictConfig) or node.keys() | OPTIONAL != set(names):
        raise UserError(
            f"protocol must have the keys {', '.join(names)} and no others; "
            f"{joined(sorted(OPTIONAL))} may be left out"
        )
    check_keys(cfg, {f"protocol.{key}": PROTOCOL[key] for key in PROTOCOL if key in node})
    require_measured(cfg, f"protocol.metric={node.metric}", node.metric)
    require_evaluation(cfg, f"protocol.metric={node.metric}", node.metric)


def require_measured(cfg: DictConfig, what: str, metric: str) -> None:
    """Raises UserError if `metrics` leave out a metric; `what` says where it is wanted."""
    key = ON_KEYS.get(metric)
    if key and not (cfg.get("metrics") or {}).get(key.partition("=")[0]):
        raise UserError(f"{what} is not measured; write metrics.{key}")


def require_evaluation(cfg: DictConfig, what: str, metric: str) -> None:
    """Raises UserError if the run would not measure a metric of samples."""
    of_samples = [quantity.name for quantity in OF_SAMPLES]
    if metric in of_samples and configured(cfg, SampleEvaluation) is None:
        raise UserError(f"{what} is not measured without callbacks.evaluation; keep that callback")


NEW, EMPTY, UNFINISHED, FINISHED = "new", "without a checkpoint", "unfinished", "finished"
PLACE_IN_LOGGER = re.compile(r"logger\.\w+\.(group|name|tags)")
LONGEST = 128  # bytes of a run's name, W&B's limit


def folder_of(cfg: DictConfig, job: HydraConf) -> Path | None:
    """The folder of this run of a study, `job` being Hydra's; None for a run of no study.

    It is named by the keys that the command line sets to several values, and by those set to one
    that another command of the study may set to another. Metrics are the same in all of a study,
    and an experiment need not be named beside a backbone; names had both before, and are found.
    """
    if not cfg.study_name:
        return None
    if cfg.run_dir:
        return Path(cfg.run_dir)
    parsed = parse(job.overrides.task)
    values = {key_of(override): override.get_value_element_as_str() for override in parsed}
    several = varied(job)
    named = several | {key for key in values if Means.NAMED in means(key)}
    chosen = {key: value for key, value in values.items() if key in named}
    if not chosen:
        return None
    check_keys(cfg, {"study_name": FOLDER})
    folder = OUTPUTS / cfg.study_name
    same = {key for key in chosen if key.split(".")[0] == "metrics"}
    same |= {"experiment"} if "backbone" in chosen else set()
    short = {key: value for key, value in chosen.items() if key in several or key not in same}
    whole = folder / name_of(chosen)
    return whole if whole.exists() or not short else folder / name_of(short)


def varied(job: HydraConf) -> set[str]:
    """The keys that take several values in a sweep."""
    searched = set(job.sweeper.get("params") or {})
    if job.mode != RunMode.MULTIRUN:
        return searched
    fixed = job.job.config.override_dirname.exclude_keys  # keys with one value in a sweep
    return searched | ({key_of(each) for each in parse(job.overrides.task)} - set(fixed))


def name_of(values: dict[str, str]) -> str:
    """The name of a run with these values of the keys that differ; it needs no quotes.

    A name above LONGEST bytes keeps the keys highest in the configuration, and ends in a hash.
    """
    parts = {
        key: re.sub(r"[^\w.+-]+", ".", f"{key}-{value}").strip(".")
        for key, value in sorted(values.items())
    }
    whole = "_".join(parts.values())
    if len(whole.encode()) <= LONGEST:
        return whole
    name, digest = "", hashing.of_text(whole)[:8]
    for key in sorted(parts, key=lambda key: (len(re.findall("[./]", key)), key)):
        longer = f"{name}{parts[key]}_"
        if len(longer.encode()) + len(digest) <= LONGEST:
            name = longer
    return name + digest


def state_of(folder: Path, cfg: DictConfig) -> str:
    """The state of a run, NEW, EMPTY, UNFINISHED or FINISHED, as rank 0 finds it, on every rank.

    Raises UserError if another process is training the run, or if its configuration differs.
    """
    if in_launched_process():
        launch.join_process_group(launch.device_of_process(cfg.trainer))
    return on_rank_zero(lambda: _state(folder, cfg))


def _state(folder: Path, cfg: DictConfig) -> str:
    if not (folder / CONFIG).is_file():
        return NEW
    require_unlocked(folder)
    finished = load_summary(folder).finished
    empty = not finished and not checkpoints.exists(folder)
    if empty and has_locks(folder):
        return EMPTY
    if empty:
        raise UserError(
            f"{folder} has no checkpoint yet, and its file system has no locks that show whether "
            "it is being trained; wait for a checkpoint, or delete the folder if it is not"
        )
    require_same(folder, cfg, "study_name")
    return FINISHED if finished else UNFINISHED


def require_same(folder: Path, cfg: DictConfig, naming: str) -> None:
    """Raises UserError if a run is another than the one asked for; `naming` is a study's key."""
    for key, *values in differences(load_config(folder), cfg):
        old, new = (each if isinstance(each, str) else json.dumps(each) for each in values)
        raise UserError(
            f"{folder} was trained with {key}={old}, but this command has {key}={new}; write "
            f"{naming}={cfg.study_name}_2 for a separate study, or move {folder} away"
        )


def move_aside(folder: Path) -> None:
    """Moves a run without a checkpoint out of the way of a new one, on rank 0."""

    def move() -> None:
        number, aside = 1, folder.parent / ABANDONED / folder.name
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{folder.name}_{number}")
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        say(f"{folder} had no checkpoint to resume from and was moved to {aside}")

    on_rank_zero(move)


def overrides_to_resume(folder: Path, overrides: list[str]) -> list[str]:
    """The overrides of a repeated command that replace the saved values when a run is resumed.

    They set where the run is trained and how it is monitored. The run keeps its options of groups,
    such as logger=none, and its place in loggers.
    """
    saved = flat(OmegaConf.to_container(load_config(folder)))
    replacing = []
    for override in (INSTEAD_OF_OPTIONS.get(each, each) for each in overrides):
        key = parse([override])[0].key_or_group
        elsewhere = Means.IDENTITY not in means(key) and not PLACE_IN_LOGGER.fullmatch(key)
        if is_resumable(key) and elsewhere and key in saved:
            replacing.append(override)
    return replacing


def check_metric(cfg: DictConfig, folder: Path | None) -> None:
    """Raises UserError if `cfg.optimized_metric` cannot be read at the end of a run."""
    if cfg.optimized_metric and folder is None:
        raise UserError(
            f"optimized_metric={cfg.optimized_metric} is read from the run folder, which must be "
            "known; write study_name=... and the values that vary, or run_dir=..."
        )


def check_search(cfg: DictConfig, job: HydraConf) -> None:
    """Raises UserError if a search varies nothing, optimises the wrong way, or mixes losses."""
    if "n_trials" not in job.sweeper:
        return
    keys = sorted(varied(job))
    if not keys:
        raise UserError(
            "a search needs a key with several values, but there is none; write one, as in "
            "lr_schedule=constant,cosine or 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
        )
    metric = str(cfg.optimized_metric)
    higher = higher_is_better(metric, extra_quantities(cfg.metrics))
    best = "maximize" if higher else "minimize"
    if higher is not None and job.sweeper.direction != best:
        raise UserError(
            f"a search that should {job.sweeper.direction} {metric} finds the worst settings; "
            f"write hydra.sweeper.direction={best}"
        )
    pruning = configured(cfg, MedianPruning)
    used = {"optimized_metric=fid": metric, "callbacks.pruning=null": pruning and pruning.metric}
    check_losses({remedy: str(each) for remedy, each in used.items()}, keys)


def check_losses(used: Mapping[str, str], keys: Iterable[str]) -> None:
    """Raises UserError if a metric by which values of `keys` are compared is a loss they change.

    `used` are the metrics by what to write instead.
    """
    loss = re.compile("(val|test)(_by_level)?/(?!psnr$|ssim$)")  # those are the same for each loss
    losses = [key for key, each in used.items() if loss.match(each)]
    changing = [key for key in keys if Means.LOSS in means(key)]
    if losses and changing:
        raise UserError(
            f"{used[losses[0]]} is a different quantity for each {changing[0]}, so it cannot be "
            f"compared in this search; write {' '.join(losses)}"
        )


def check_choice(cfg: DictConfig, metric: str, keys: Iterable[str]) -> None:
    """Raises UserError if a study cannot choose values of `keys` by a metric."""
    require_measured(cfg, f"choose: {metric}", metric.partition("/")[0])
    own = extra_quantities(cfg.get("metrics") or OmegaConf.create())
    if higher_is_better(metric) is None and higher_is_better(metric, own):
        raise UserError(
            f"choose: {metric} is better if it is higher, and of a metric of your own the lowest "
            "value is chosen; write one of which lower is better, such as fid"
        )
    check_losses({"choose: fid": metric}, keys)


def extra_quantities(metrics: DictConfig) -> list[Quantity]:
    """The quantities of `metrics.extra`, by their classes, if these say which value is better."""
    found: list[Quantity] = []
    for name, node in (metrics.get("extra") or {}).items():
        kind: Any = target_of(node, f"metrics.extra.{name}").func
        if issubclass(kind, Metric):
            of_class = getattr(kind, "quantities", ())  # or each object has its own
            found += of_class if isinstance(of_class, tuple) else ()
        elif isinstance(better := getattr(kind, "higher_is_better", None), bool):  # of torchmetrics
            found.append(described(str(name), kind, better))
    return found


def final_metric(folder: Path, kind: str) -> float:
    """The metric of a kind, such as fid, of a finished run; UserError unless it has exactly one."""
    metrics = load_summary(folder).metrics
    found = [v for name, v in metrics.items() if name == kind or name.startswith(f"{kind}/")]
    if len(found) != 1:
        kinds = {n if n.startswith("val/") else n.split("/")[0] for n in metrics}
        names = sorted(kinds - {"val_by_level"})
        raise UserError(
            f"optimized_metric={kind} is not the name of one metric of {folder}; "
            f"use one of {', '.join(names)}"
        )
    if not math.isfinite(found[0]):
        raise UserError(f"{kind} of {folder} is {found[0]}, which no search can compare")
    return found[0]
