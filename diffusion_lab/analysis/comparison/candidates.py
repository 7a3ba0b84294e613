"""Reads the run folders below some paths, and says why some of them cannot be compared."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.analysis.search import walk
from diffusion_lab.build.config_keys import CLASS, FRACTION, Means, Settings, flat, means
from diffusion_lab.common.files import read_rows
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs import published
from diffusion_lab.runs.autoencoder_run import AutoencoderRun
from diffusion_lab.runs.base_run import OpenRun
from diffusion_lab.runs.files import METRICS, SUMMARY, load_summary
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.opening import kind_of
from diffusion_lab.runs.results import EVALUATIONS, evaluations_of
from diffusion_lab.runs.samplings import IMAGES, OWN_WAY, Record, Sampling, samplings_of, way_of
from diffusion_lab.runs.weights import CurrentWeights
from diffusion_lab.training.tuned import FOUND

RATE = "train/images_per_second"
NORM, LARGEST_NORM = "train/grad_norm", "train/grad_norm_max"
NEEDED = ("ended_at", "metrics", "images_seen", "training_seconds")  # images have the first two
BEGINNING = 0.1  # the share of training in which `spike_in` looks for none


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    folder: Path
    config: DictConfig
    summary: dict
    rows: list[dict]  # the rows of metrics.jsonl
    weights: CurrentWeights
    kept: list[Record]  # evaluations of the current weights, the one from training first
    # finite values of metrics and costs, by short name: "fid", "kid", "macs", ...
    values: dict[str, float] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def drawn_elsewhere(self) -> bool:
        """Whether these are images that another program drew."""
        return IMAGES in self.config

    @cached_property
    def known(self) -> Settings:
        """The settings that are not null; equal numbers are written in the same way (1.0 as 1)."""
        plain = flat(OmegaConf.to_container(self.config))
        return {key: whole(value) for key, value in plain.items() if value is not None}

    @cached_property
    def settings(self) -> Settings:
        """The settings that define the run's composition; of another program's images, the name."""
        known = {FRACTION: 1} | self.known  # null means all of the data, too
        if OmegaConf.select(self.config, "budget.seconds") is not None:
            known.pop("trainer.max_steps", None)  # unlimited: the run ends at trainer.max_time
        if network := known.pop(f"autoencoder.{CLASS}", None):  # named as other networks are
            known[f"backbone.{CLASS}"] = network
        named = {IMAGES: self.config.name} if self.drawn_elsewhere else {}
        return named | {k: v for k, v in known.items() if Means.COMPOSITION in means(k)}

    @property
    def kind(self) -> type[OpenRun]:
        """The kind of run: of a diffusion model, or of another family."""
        return kind_of(self.config)

    @cached_property
    def own_way(self) -> dict[str, Any]:
        """The sampler and guidance of the run's configuration, in the form of records."""
        return way_of(cast(dict, OmegaConf.to_container(self.config, resolve=True)))

    def drawn_in(self, way: Sampling) -> "Run":
        """The run, with records that may be compared with those of other ways (`samplings_of`)."""
        return replace(self, kept=[record | {OWN_WAY: way} for record in self.kept])

    def ways(self, sampling: Sampling) -> list[Sampling]:
        """The samplings that one with these settings counts as (`samplings_of`)."""
        known = {"sampling": sampling, "training_seed": self.seed}
        if self.kept and OWN_WAY in self.kept[0]:
            known[OWN_WAY] = self.kept[0][OWN_WAY]
        return samplings_of(known)

    @property
    def finished_at(self) -> tuple[str, str]:
        """The time when the run ended, in UTC, with the folder's name to break ties."""
        return self.summary["ended_at"], str(self.folder)

    @cached_property
    def images_per_second(self) -> float | None:
        """The median over the logged windows."""
        return self._of_all_rows(published.RATE, median_rate)

    @cached_property
    def gradient_spike(self) -> float:
        """How far gradients rose above their median (`spike_in`)."""
        return self._of_all_rows(published.SPIKE, spike_in)

    def _of_all_rows(self, key: str, measure: Callable[[list[dict]], Any]) -> Any:
        """The value that `measure` has for the rows, before a published run left out some."""
        thinned = published.facts_of(self.folder).get(published.THINNED)
        return thinned[key] if thinned else measure(self.rows)

    def part(self, key: str) -> dict[str, Any] | None:
        """A part of the configuration as plain values; None if it is null or missing."""
        node = self.config.get(key)
        plain = OmegaConf.to_container(node) if isinstance(node, DictConfig) else None
        return None if plain is None else cast(dict[str, Any], plain)


def median_rate(rows: Iterable[dict]) -> float | None:
    """The median of the images per second in rows of metrics.jsonl; None without any."""
    rates = [row[RATE] for row in rows if RATE in row]
    return statistics.median(rates) if rates else None


def spike_in(rows: Iterable[dict]) -> float:
    """The largest gradient norm in rows of metrics.jsonl by its median; 0 if it is not logged.

    The beginning is left out, as all gradients are large in it.
    """
    known = [row for row in rows if {NORM, LARGEST_NORM} <= row.keys()]
    known = known[int(BEGINNING * len(known)) :]
    usual = statistics.median(row[NORM] for row in known) if known else 0
    return max(row[LARGEST_NORM] for row in known) / usual if usual else 0


def whole(value: object) -> object:
    """Writes equal numbers in the same way: 1.0 becomes 1, also in lists."""
    if isinstance(value, list):
        return [whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def run_folders(paths: Iterable[str | Path]) -> list[Path]:
    """Finds the run folders at or below the paths; raises UserError for a path without one.

    The tuning runs of a study are found only if the path is their folder, and published copies
    only if there is nothing else.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        below = list(_search(path, copies=False)) or list(_search(path, copies=True))
        if not below:
            raise UserError(
                f"there is no run folder at or below {path}; give folders that contain runs"
            )
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _search(path: Path, copies: bool) -> Iterator[Path]:
    for folder, is_run, folders, _ in walk(path):
        below = [(each, folder / each) for each in folders]
        folders[:] = [
            name
            for name, each in below
            if not (each / FOUND).is_file() and (copies or not published.has_card(each))
        ]
        if is_run:
            yield folder


def read(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Reads the finished runs; also returns a sentence on each folder or file that is left out.

    Raises UserError if a published run was changed, because nothing else in it can be trusted then.
    """
    runs, left_out = [], []
    for folder in folders:
        published.require_unchanged_records(folder)
        try:
            config, summary = load_config(folder), load_summary(folder)
            if reason := unfit(folder, config, summary):
                left_out.append(f"{folder} is left out: {reason}")
                continue
            rows, present = rows_of(folder), CurrentWeights(folder)
            found = evaluations_of(folder, config.seed, present)
            if not present.known and any((folder / EVALUATIONS).glob("*.json")):
                left_out.append(
                    f"Later evaluations of {folder} are left out: its checkpoints are gone, so it "
                    "is unknown whether the metrics belong to its weights"
                )
            runs.append(Run(folder, config, summary, rows, present, found))
        except UserError as error:  # report a damaged run, and compare the others
            left_out.append(str(error))
    return runs, left_out


def rows_of(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, without those that are not of numbers."""
    rows = read_rows(folder / METRICS)
    return [row for row in rows if all(isinstance(value, int | float) for value in row.values())]


def unfit(folder: Path, config: DictConfig, summary: dict) -> str | None:
    """The reason why a run cannot be compared; None if it can."""
    if kind_of(config) is AutoencoderRun and not any((folder / EVALUATIONS).glob("*.json")):
        return (
            "it is an autoencoder; samples of a VAE are measured by "
            f"`diffusion-lab evaluate run={folder}`"
        )
    needed = NEEDED[: 2 if IMAGES in config else None] if summary.get("finished") else ()
    damaged = not summary or any(summary.get(key) is None for key in needed)
    if damaged and (folder / SUMMARY).exists():
        return f"its {SUMMARY} is damaged and cannot be read"
    if not summary.get("finished"):
        step = f" at step {summary['steps']:,}" if summary.get("steps") else ""
        command = kind_of(config).command
        return f"it is unfinished{step}; resume it with `diffusion-lab {command} resume={folder}`"
    if summary.get("pruned"):
        return f"a search ended it early, at step {summary['steps']:,}"
    return None
