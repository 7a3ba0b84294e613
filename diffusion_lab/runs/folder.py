"""Run folders: their content, the place of a new one, and the saved configuration of each.

config.yaml  checkpoints/*.ckpt  metrics.jsonl  samples/*.png  summary.json  wandb/
error.txt  (if it failed)
snapshots/*.safetensors  averages/*/  (with callbacks.posthoc_ema)
published.json in place of checkpoints, samples and wandb, if the run is published
"""

import itertools
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from functools import cache
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

import diffusion_lab
from diffusion_lab.assembly.config_keys import verbatim
from diffusion_lab.assembly.families import TRAINED
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.common.files import OUTPUTS, write_atomically, write_json
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.compute import slurm
from diffusion_lab.compute.distributed import on_rank_zero, rank_and_world
from diffusion_lab.first_stage.trained import COPY_FOLDER
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.current import EXPORTED
from diffusion_lab.runs.files import CONFIG, FORMAT, SUMMARY, WRITTEN_BY, load_record
from diffusion_lab.runs.log_names import grouped
from diffusion_lab.runs.progress import is_locked
from diffusion_lab.runs.summary import Summary, load_summary

PACKAGES = ("diffusion_lab", "torch", "lightning")  # packages whose classes our runs name
FAMILIES = "diffusion_lab.families."
# The places of the classes that each key may hold, with all keys below it; the longest key counts.
# A class of another place may start a program or empty a file when it is built.
PLACES = {
    "alignment": ("diffusion_lab.training.alignment.",),
    "alignment.extractor": ("diffusion_lab.metrics.extractor.",),
    "augmentation": ("diffusion_lab.data.augmentation.",),
    "autoencoder": ("diffusion_lab.first_stage.autoencoder.",),
    "backbone": ("diffusion_lab.backbone.", FAMILIES, "torch.nn."),
    "budget": ("diffusion_lab.estimate.budget.",),
    "callbacks": ("diffusion_lab.training.callbacks.", "lightning.pytorch.callbacks."),
    "conditioning": ("diffusion_lab.backbone.conditioning.",),
    "coupling": ("diffusion_lab.data.coupling.",),
    "data": ("diffusion_lab.data.",),
    "first_stage": ("diffusion_lab.first_stage.",),
    "guidance": ("diffusion_lab.diffusion.guidance.", FAMILIES),
    "logger": ("diffusion_lab.training.logger.",),
    "lr_schedule": ("diffusion_lab.training.lr_schedule.",),
    "metrics": ("diffusion_lab.metrics.",),
    "metrics.extra": ("diffusion_lab.metrics.", "torchmetrics."),
    "objective": ("diffusion_lab.diffusion.objective.", FAMILIES),
    "objective.discriminator": ("diffusion_lab.backbone.discriminator.",),
    "optimizer": ("diffusion_lab.training.optimizer.", "torch.optim."),
    "reconstruction": ("diffusion_lab.first_stage.reconstruction.",),
    "sampler": ("diffusion_lab.diffusion.sampler.", FAMILIES),
    "schedule": ("diffusion_lab.diffusion.schedule.",),
    "trainer": ("lightning.Trainer", "lightning.pytorch.trainer."),
    "trainer.strategy": ("diffusion_lab.compute.sharding.", "lightning.pytorch.strategies."),
}


def check(cfg: DictConfig, source: Path) -> None:
    """Warns of classes from other packages in a configuration, read from the file `source`.

    Raises UserError for a name in PACKAGES that is anything but a class which its key may hold.
    """
    strangers = set()
    for key, name in targets(cfg):
        if is_trusted(key, name):
            continue
        if name.split(".")[0] in PACKAGES:
            raise UserError(
                f"{source} names {name} at {key}, which is not a class that runs of this program "
                "use there; open runs of this program only"
            )
        strangers.add(name)
    if strangers:
        warn(str(source.resolve()), ", ".join(sorted(strangers)))


def targets(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields the key and the class of each `_target_`, at any depth, and of a user's family."""
    if isinstance(node, DictConfig):
        if not key and node.get("family") not in (None, *TRAINED):
            yield "family", f"{node.family}.RUN"
        if "_target_" in node:
            yield key, str(node["_target_"])
        for name in node:
            yield from targets(node[name], f"{key}.{name!s}".lstrip("."))
    elif isinstance(node, ListConfig):
        for each in node:
            yield from targets(each, key)


def is_trusted(key: str, name: str) -> bool:
    """Whether a dotted name is that of a class which a key may hold, by the place it is defined in.

    Nothing is imported for a name of another place, or for a class that options of this package
    name. Of others the module that defines a class counts, too: the one in the name may only import
    it.
    """
    rows = [row for row in PLACES if f"{key}.".startswith(f"{row}.")]
    places = PLACES[max(rows, key=len)] if rows else ()
    if not name.startswith(places):
        return False
    if name in shipped():
        return True
    try:
        found = get_object(name)
    except Exception:  # importing may fail in any way
        return key == "objective.loss"  # a loss that is gone is known by its facts
    return isinstance(found, type) and f"{found.__module__}.".startswith(places)


@cache
def shipped() -> frozenset[str]:
    """The classes that the options of this package name."""
    texts = (path.read_text() for path in conf_dir().rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_: (\S+)", text))


@cache  # a command reads the same configuration more than once
def warn(source: str, names: str) -> None:
    """Prints a warning that the file `source` names classes of other packages."""
    say(
        f"Warning: {source} names {names}, which is part of neither {', '.join(PACKAGES[:-1])} "
        f"nor {PACKAGES[-1]}. Opening a run executes such code, so continue only if you trust the "
        "source of the run."
    )


ABANDONED = ".abandoned"  # folder beside a study's runs, of those that left no checkpoint


def check_new(cfg: DictConfig) -> None:
    """Raises UserError if `cfg.run_dir` already holds a run."""
    if not cfg.run_dir:
        return
    folder = Path(cfg.run_dir)
    if folder.is_file():
        raise UserError(f"run_dir={folder} is a file; choose a folder")
    if (folder / EXPORTED).exists():
        raise UserError(f"run_dir={folder} contains an exported model; choose another folder")
    if not (folder / CONFIG).exists():
        return
    if checkpoints.exists(folder):
        raise UserError(
            f"run_dir={folder} already contains a run; choose another folder, or resume the run "
            f"with resume={folder}"
        )
    raise UserError(
        f"run_dir={folder} contains a run without {checkpoints.LAST}; wait if it is training, or "
        "delete the folder if it was killed"
    )


def create(cfg: DictConfig, command: str, overrides: list[str]) -> Path:
    """Creates the folder of a new run on rank 0; returns its path on every rank.

    The folder is `cfg.run_dir`, or outputs/<name>/<timestamp>. A requeued SLURM job recognises it
    by `command` and `overrides`. Raises UserError if the folder cannot be created.
    """

    def make() -> Path:
        for name, logger in (cfg.get("logger") or {}).items():
            if "run_id" in logger and not logger.run_id:
                # set before a logger starts, so that resuming finds it; W&B's agent may have one
                sweeping = name == "wandb" and "WANDB_SWEEP_ID" in os.environ
                chosen = os.environ.get("WANDB_RUN_ID") if sweeping else None
                logger.run_id = chosen or uuid.uuid4().hex[:8]
        if HydraConfig.initialized():
            cfg.choices = grouped(HydraConfig.get().runtime.choices)
        try:
            folder = _make_folder(cfg)
            slurm.sign(folder, command, overrides)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be created ({error.strerror}); choose another place with "
                "run_dir=..."
            ) from error
        return folder

    return on_rank_zero(make)


def _make_folder(cfg: DictConfig) -> Path:
    if cfg.run_dir:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        return Path(cfg.run_dir)
    folder = stamp = OUTPUTS / cfg.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run started within this second
            folder = stamp.with_name(f"{stamp.name}_{attempt}")
    return folder


def unfinished(name: str) -> Path | None:
    """The latest run `name` in outputs/ with a checkpoint that is neither finished nor running."""
    folders = sorted(path.parent for path in (OUTPUTS / name).glob(f"*/{CONFIG}"))
    for folder in reversed(folders):
        done = load_summary(folder).finished
        if checkpoints.exists(folder) and not done and not is_locked(folder):
            return folder
    return None


def reopen(folder: Path) -> None:
    """Marks a finished run as unfinished in its summary before it is trained longer; on rank 0.

    Without this a run killed during that training would still count as finished at its old length.
    """
    summary = load_summary(folder)
    if summary.finished:
        write_summary(folder, replace(summary, finished=False))


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes summary.json atomically."""
    write_json(folder / SUMMARY, asdict(summary))


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes the configuration on rank 0, with every interpolation resolved."""
    if rank_and_world()[0] == 0:
        written_by = {WRITTEN_BY: {"format": FORMAT, "version": diffusion_lab.__version__}}
        text = OmegaConf.to_yaml(written_by) + OmegaConf.to_yaml(cfg, resolve=True)
        write_atomically(folder / CONFIG, text)


def load_config(folder: str | Path) -> DictConfig:
    """Reads the configuration of a run whose classes will be built; raises UserError.

    Warns of classes that belong neither to this package nor to torch or lightning.
    """
    cfg = load_record(folder)
    first_stage = cfg.get("first_stage", {})  # an autoencoder's run has none
    if "run" in first_stage:
        first_stage.run = verbatim(str(folder))  # the copy in the folder, wherever that now is
    if "path" in first_stage:
        first_stage.path = verbatim(str(Path(folder) / COPY_FOLDER))
    check(cfg, Path(folder) / CONFIG)
    return cfg
