"""Runs as their folders record them: configuration, summary, evaluations and rows of training."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import CLASS, FRACTION, Means, Settings, flat, means
from diffusion_lab.assembly.families import AUTOENCODER, family_of
from diffusion_lab.common.files import read_json, read_rows
from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.quantity import (
    BITS_PER_CODE,
    COPIES,
    FINGERPRINT,
    HIGHER,
    LOWER,
    QUANTITIES,
    Quantity,
)
from diffusion_lab.report.words import Fact
from diffusion_lab.runs import published, results
from diffusion_lab.runs.current import CurrentWeights
from diffusion_lab.runs.files import METRICS, SUMMARY, load_record
from diffusion_lab.runs.search import walk
from diffusion_lab.runs.summary import Summary, load_summary
from diffusion_lab.training.tuned import FOUND

RATE = "train/images_per_second"
NORM, LARGEST_NORM = "train/grad_norm", "train/grad_norm_max"
NEEDED = ("ended_at", "metrics", "images_seen", "training_seconds")  # images have the first two
BEGINNING = 0.1  # the share of training in which no spike is looked for
USUAL = {"protocol.contrasts": "all", "protocol.sampling": "equal"}  # also if they are left out
DAMAGE = (AttributeError, LookupError, TypeError, ValueError)  # what a damaged report raises
BY_CONTROL, FOUND_AT = "copy_ratio_by_control", "copies_found_at_"


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    folder: Path
    config: DictConfig
    summary: Summary
    rows: list[dict]  # the rows of metrics.jsonl
    weights: CurrentWeights
    kept: list[results.Record]  # evaluations of the current weights, the one from training first

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def drawn_elsewhere(self) -> bool:
        """Whether these are images that another program drew."""
        return results.IMAGES in self.config

    @property
    def family(self) -> str:
        return family_of(self.config)

    @property
    def network(self) -> str:
        """The name of the network's class."""
        return str(self.settings.get(f"backbone.{CLASS}")).rpartition(".")[2]

    @cached_property
    def known(self) -> Settings:
        """The settings that are not null; equal numbers are written in the same way (1.0 as 1)."""
        plain = flat(OmegaConf.to_container(self.config))
        return {key: whole(value) for key, value in plain.items() if value is not None}

    @cached_property
    def settings(self) -> Settings:
        """The settings that define the run's arm; of another program's images, the name."""
        known = {FRACTION: 1} | self.known  # null means all of the data, too
        if OmegaConf.select(self.config, "budget.seconds") is not None:
            known.pop("trainer.max_steps", None)  # unlimited: the run ends at trainer.max_time
        if network := known.pop(f"autoencoder.{CLASS}", None):  # named as other networks are
            known[f"backbone.{CLASS}"] = network
        known = {k: v for k, v in known.items() if USUAL.get(k) != v}
        named = {results.IMAGES: self.config.name} if self.drawn_elsewhere else {}
        return named | {k: v for k, v in known.items() if Means.COMPOSITION in means(k)}

    @cached_property
    def own_way(self) -> dict[str, Any]:
        """The sampler and guidance of the run's configuration, in the form of records."""
        return results.way_of(cast(dict, OmegaConf.to_container(self.config, resolve=True)))

    def drawn_in(self, way: results.Sampling) -> "Run":
        """The run, with records that may be compared with those of other ways (`samplings_of`)."""
        return replace(self, kept=[record | {results.OWN_WAY: way} for record in self.kept])

    def ways(self, sampling: results.Sampling) -> list[results.Sampling]:
        """The samplings that one with these settings counts as (`samplings_of`)."""
        return results.samplings_of(self.kept[0] | {"sampling": sampling})

    @property
    def finished_at(self) -> tuple[str, str]:
        """The time when the run ended, in UTC, with the folder's name to break ties."""
        return self.summary.ended_at or "", str(self.folder)

    @cached_property
    def of_rows(self) -> dict[str, Any]:
        """The facts of `facts_in` on all rows, also on those that publishing left out."""
        return published.facts_of(self.folder).get(published.THINNED) or facts_in(self.rows)

    @property
    def images_per_second(self) -> float | None:
        return self.of_rows[published.RATE]

    @property
    def gradient_spike(self) -> float:
        return self.of_rows[published.SPIKE]

    def part(self, key: str) -> dict[str, Any]:
        """A part of the configuration as plain values; empty if it is null or missing."""
        node = self.config.get(key)
        return cast(dict, OmegaConf.to_container(node)) if isinstance(node, DictConfig) else {}


def facts_in(rows: Sequence[dict]) -> dict[str, Any]:
    """The median of images/s in rows, or None, and the largest gradient by its median, or 0."""
    rates = [row[RATE] for row in rows if RATE in row]
    known = [row for row in rows if {NORM, LARGEST_NORM} <= row.keys()]
    known = known[int(BEGINNING * len(known)) :]  # all gradients are large in the beginning
    usual = statistics.median(row[NORM] for row in known) if known else 0
    return {
        published.RATE: statistics.median(rates) if rates else None,
        published.SPIKE: max(row[LARGEST_NORM] for row in known) / usual if usual else 0,
    }


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
        folders[:] = [
            name
            for name in folders
            if not (folder / name / FOUND).is_file()
            and (copies or not published.has_card(folder / name))
        ]
        if is_run:
            yield folder


def read(folders: Iterable[Path]) -> tuple[list[Run], list[Fact]]:
    """Reads the finished runs; also returns a fact on each folder or file that is left out."""
    runs, left_out = [], []
    for folder in folders:
        try:
            config, summary = load_record(folder), load_summary(folder)
            if reason := unfit(folder, config, summary):
                left_out.append(reason)
                continue
            rows, present = read_rows(folder / METRICS), CurrentWeights(folder)
            rows = [row for row in rows if all(isinstance(v, int | float) for v in row.values())]
            found = results.evaluations_of(folder, config.seed, present)
            if not present.known and any((folder / results.EVALUATIONS).glob("*.json")):
                left_out.append(Fact("weights_gone", run=folder))
            runs.append(Run(folder, config, summary, rows, present, found))
        except UserError as error:  # report a damaged run, and compare the others
            left_out.append(Fact("said", text=str(error)))
    return runs, left_out


def unfit(folder: Path, config: DictConfig, summary: Summary) -> Fact | None:
    """The reason why a run cannot be compared; None if it can."""
    family = family_of(config)
    if family == AUTOENCODER and not any((folder / results.EVALUATIONS).glob("*.json")):
        return Fact("no_samples", run=folder)
    needed = NEEDED[: 2 if results.IMAGES in config else None] if summary.finished else ()
    damaged = summary == Summary() or any(getattr(summary, key) is None for key in needed)
    if damaged and (folder / SUMMARY).exists():
        return Fact("damaged", run=folder, file=SUMMARY)
    if not summary.finished:
        command = "train-autoencoder" if family == AUTOENCODER else "train"
        return Fact("unfinished", run=folder, steps=summary.steps, command=command)
    return Fact("pruned", run=folder, steps=summary.steps) if summary.pruned else None


def quantities(runs: Iterable[Run], controls: Iterable[str]) -> dict[str, Quantity]:
    """The quantities that tables show, by name: user-defined metrics, then controls of copies."""
    runs = list(runs)
    recorded = [run.summary.extra_quantities for run in runs]
    recorded += [record.get("extra_quantities", []) for run in runs for record in run.kept]
    extra = [Quantity(**facts) for each in recorded for facts in each]
    known = {quantity.name: quantity for quantity in (*QUANTITIES, *extra)}
    code = f"test/{BITS_PER_CODE.name}"
    with_codes = [run for run in runs if code in run.summary.metrics]
    if len({OmegaConf.select(run.config, "first_stage.sha256") for run in with_codes}) > 1:
        del known[BITS_PER_CODE.name]  # codes of other first stages are other data
    known |= {name: quantity for name in controls if (quantity := _of_control(name))}
    return {name: each for name, each in known.items() if each.judged or each.tabled}


def _of_control(name: str) -> Quantity | None:
    """The quantity of a control of copies that tables show; None for any other value."""
    kind = name.removeprefix("pixel_")
    by = " by pixels" * (kind != name)
    if kind == BY_CONTROL:
        meaning = f"copies{by}, by a control run's limit"
        return Quantity(name, f"Copies{by}, by control", meaning, LOWER, judged=False, tabled=True)
    if not kind.startswith(FOUND_AT):
        return None
    level = kind.removeprefix(FOUND_AT)
    title = f"Copies found{by} at {level}"
    meaning = (
        f"training images, noised to sigma / alpha of {level} and denoised by the run, that count "
        f"as copies{by}"
    )
    return Quantity(name, title, meaning, HIGHER, percent=True, judged=False, tabled=True)


def copies(
    runs: Iterable[Run], sampling: results.Sampling
) -> tuple[dict[Path, dict[str, float]], list[Fact]]:
    """The counts of copies by run folder, if measured alike, and facts on what is left out."""
    found: dict[Path, dict[str, float]] = {}
    protocols, facts = [], []
    for run in runs:
        report = read_json(run.folder / "memorization" / "report.json")
        if "neighbours" not in report:
            continue
        try:
            if sampling not in run.ways(report["sampling"]):
                reason = "its report is for another sampler, guidance or seed"
            elif not run.weights.known:
                reason = "its checkpoints are gone, so that its report may be of other weights"
            elif not run.weights.match(report):
                reason = "its report is for other weights than the current ones"
            else:
                values, protocol = copies_in(report), dict(report["protocol"])
                found[run.folder] = values
                protocols.append(protocol)
                continue
        except DAMAGE:
            reason = "its report is damaged"
        facts.append(Fact("report", run=run.folder, reason=reason))
    keys = dict.fromkeys(key for each in protocols for key in each if key != FINGERPRINT)
    said = {key: list(dict.fromkeys(str(each.get(key)) for each in protocols)) for key in keys}
    if unequal := [f"{key} is {' or '.join(own)}" for key, own in said.items() if len(own) > 1]:
        return {}, [*facts, Fact("reports_unequal", differences="; ".join(unequal))]
    return found, facts


def counted(run: Run) -> list[results.Record]:
    """The counts of copies among samples of a run's current weights, as the record of a report."""
    report = read_json(run.folder / "memorization" / "report.json")
    with suppress(*DAMAGE):
        if "neighbours" in report and run.weights.match(report):
            how = {"protocol": {**report["protocol"]}, "sampling": {**report["sampling"]}}
            return [how | {"metrics": copies_in(report)}]
    return []


def copies_in(report: dict) -> dict[str, float]:
    """The counts of a report by short name: copies, and what its controls say of them."""
    found: dict[str, float] = {}
    controls = report.get("controls", {})
    for start, (space, counts) in zip(("", "pixel_"), report["neighbours"].items(), strict=True):
        found[start + COPIES.name] = counts["copy_ratio"]
        if "negative" in controls:
            found[start + BY_CONTROL] = controls["negative"]["neighbours"][space][BY_CONTROL]
        for level, rates in controls.get("positive", {}).get("sigma_over_alpha", {}).items():
            found[f"{start}{FOUND_AT}{level}"] = rates[space]["copies"]
        for level, rates in controls.get("grain", {}).get("grey_levels", {}).items():
            found[f"{start}copies_found_with_grain_{level}"] = rates[space]["copies"]
    return found
