"""The command `compare`: from run folders to a folder with a table, plots and a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from diffusion_lab.analysis.comparison import (
    copies,
    curves,
    drawings,
    fairness,
    measurements,
    page,
    study_protocol,
    tuning,
)
from diffusion_lab.analysis.comparison.candidates import Run, read, run_folders
from diffusion_lab.analysis.comparison.data_sizes import arranged, crossings, data_lines
from diffusion_lab.analysis.comparison.groups import Group, grouped, runs_of, trained
from diffusion_lab.analysis.comparison.in_words import correction_notes, setting, ways_notes
from diffusion_lab.analysis.comparison.other_samplings import other_samplings
from diffusion_lab.analysis.comparison.output import write
from diffusion_lab.analysis.comparison.page import Judged, Report
from diffusion_lab.analysis.comparison.pictures import samples
from diffusion_lab.analysis.comparison.scaling_section import scaling
from diffusion_lab.analysis.comparison.to_wandb import PROJECT, log_comparison
from diffusion_lab.analysis.comparison.verdict import Verdict, verdicts
from diffusion_lab.build.config_keys import as_list
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.common.folders import require_own
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import optional
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.metric import Protocol
from diffusion_lab.metrics.quantities import TEST_LOSS, VALIDATION_LOSS
from diffusion_lab.runs import published
from diffusion_lab.runs.results import common_metrics
from diffusion_lab.runs.samplings import Sampling
from diffusion_lab.training.protocol import PAIRED

COSTS = {"macs": "MACs per image", "training_seconds": "training time, minutes"}


@dataclass(frozen=True)
class Collection:
    """Compositions measured by one protocol and sampling; `names` are the metrics' full names.

    `left_out` has a sentence on each run that is not compared.
    """

    groups: list[Group]
    names: dict[str, str]
    protocol: Protocol
    sampling: Sampling
    omitted: list[str]  # sentences on metrics that are left out
    left_out: list[str]


def compare_runs(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Compares the runs at or below `cfg.paths`, and writes the folder `cfg.output`.

    With `cfg.wandb` it logs the comparison to that W&B project, too.
    """
    paths = [str(path) for path in as_list(cfg.paths)]
    if not paths:
        raise UserError(
            "give run folders, or folders that contain some: diffusion-lab compare outputs"
        )
    check_keys(cfg, {"wandb": optional(PROJECT)})
    result = compare(paths, str(cfg.output))
    if cfg.wandb is not None:
        log_comparison(Path(str(cfg.output)), cfg.wandb, result)
    return result


def compare(paths: Sequence[str], output: str) -> dict[str, object]:
    """Compares the run folders at or below `paths`; writes the folder `output`.

    Raises UserError, before anything is written, if there is no run, if the runs were measured in
    different ways, or if `output` contains other files.
    """
    folder = Path(output)
    require_own(folder, page.is_ours)
    collection = collect(paths)
    groups, left_out = collection.groups, collection.left_out
    protocol = study_protocol.protocol_of(runs_of(trained(groups))) or {}
    primary, test = protocol.get("metric"), protocol.get("test", PAIRED)
    judged = judge_all(collection, primary, test, protocol.get("seeds"))
    if not judged:
        raise UserError("none of these runs has a finite value of any metric to compare")
    measured = (collection.protocol, collection.sampling, collection.names)
    others = other_samplings(groups, *measured, judged[0].metric, test, protocol.get("seeds"))
    said = notes(collection, judged, primary)
    facts = (setting(groups, *measured), collection.names, said, left_out)
    drawn = (tuning.drawings(groups), scaling(groups), others)
    report = Report(groups, judged, samples(groups), *facts, *drawn)
    write(folder, report)
    for sentence in (*left_out, f"{judged[0].verdict.answer}."):
        say(sentence)
    for sentence in report.sentences:
        say(f"  {sentence}.")
    say(f"Table, plots and page: {folder / 'index.html'}")
    return {
        "folder": str(folder),
        "verdict": {each.metric.name: each.verdict.answer for each in judged},
        "compositions": {group.name: [str(run.folder) for run in group.runs] for group in groups},
        "left_out": left_out,
    }


def notes(collection: Collection, judged: Sequence[Judged], primary: str | None) -> list[str]:
    """The sentences on the whole comparison: its protocol, tests, tuning, budgets and ways."""
    groups, ours = collection.groups, trained(collection.groups)
    said = [
        *study_protocol.notes(ours),
        *correction_notes({each.metric.name: each.verdict for each in judged}, primary),
        *tuning.notes(ours),
        *fairness.notes(groups),
        *ways_notes(groups, collection.sampling),
        *collection.omitted,
    ]
    if by_validation(collection):
        said.append(
            "Samples are compared with validation images, by which these runs may have been "
            "chosen; for a report, measure them by `diffusion-lab evaluate metrics.reference=train`"
        )
    return said


def collect(paths: Sequence[str | Path]) -> Collection:
    """Collects the compositions at or below `paths`, sorted by size of the data, then by FID.

    Raises UserError if there are none, if they were measured in different ways, or if one of the
    paths is a published folder that was changed.
    """
    for path in map(Path, paths):
        published.require_whole(path)
    folders = run_folders(paths)
    say(f"{len(folders)} run folders")
    runs, left_out = read(folders)
    if not runs:
        raise UserError(f"there is nothing to compare: {'; '.join(left_out)}")
    runs, measured_else = study_protocol.of_one_protocol(runs)
    runs = study_protocol.with_own_ways(runs)
    protocol, sampling, measured = common_metrics({run.folder: run.kept for run in runs})
    names = measurements.full_names(list(measured.values()))
    counts, omitted = copies.counted(runs, sampling)
    if not (one_loss := measurements.losses_compare(runs)):
        omitted.append(
            "Denoising losses are left out: objective, schedule, data or first stage differ, so "
            "the losses are different quantities"
        )
    compared = []
    for run in runs:
        facts = (measured[run.folder], names, counts.get(run.folder, {}))
        values = measurements.values_of(run, *facts)
        if not one_loss:
            for loss in (TEST_LOSS, VALIDATION_LOSS):
                values.pop(loss.name, None)
        omitted += measurements.not_finite(run, values)
        compared.append(replace(run, values=measurements.finite(values)))
    groups, repeated = grouped(compared)
    groups.sort(key=lambda group: group.mean("fid") if group.values("fid") else math.inf)
    left_out += measured_else + repeated
    return Collection(arranged(groups), names, protocol, sampling, omitted, left_out)


def judge_all(
    collection: Collection, primary: str | None, test: str, seeds: Sequence[int] | None
) -> list[Judged]:
    """The verdicts and plots by each metric that a run has; the primary one comes first."""
    metrics = measurements.judged_by(runs_of(collection.groups))
    metrics.sort(key=lambda metric: metric.name != primary)
    found = verdicts(collection.groups, metrics, primary, test, seeds)
    return [judge(collection, m, found[m.name]) for m in metrics if m.name in found]


def judge(collection: Collection, metric: Quantity, said: Verdict) -> Judged:
    """The verdict and the plots by one metric."""
    groups = collection.groups
    # training measures the loss of validation images on the way, and of test images at its end
    measured = VALIDATION_LOSS if metric is TEST_LOSS else metric
    in_training = [
        (group, curves.curve(group, measured.name, name_in_rows(collection, group, measured)))
        for group in groups
    ]
    axes = curves.AXES if any(len(points) > 1 for _, points in in_training) else ()
    along = [drawings.along(in_training, measured, axis) for axis in axes]
    fronts = [drawings.pareto(groups, metric, cost, label) for cost, label in COSTS.items()]
    lines = data_lines(groups, metric.name)
    crossed = crossings(lines, metric)
    return Judged(
        metric,
        said,
        drawings.by_seed(groups, metric),
        [each for each in along if each],
        [each for each in fronts if each],
        lines,
        drawings.over_data(lines, metric, crossed) if lines else None,
        crossed,
    )


def name_in_rows(collection: Collection, group: Group, metric: Quantity) -> str | None:
    """A metric's name in metrics.jsonl; None if training measured it in another way than here."""
    if metric.name == VALIDATION_LOSS.name:
        return "val/loss"
    alike = all(measured_alike(run, collection) for run in group.runs)
    return collection.names.get(metric.name) if alike else None


def measured_alike(run: Run, collection: Collection) -> bool:
    """Whether a run's training measured metrics in the way that is compared."""
    summary = run.summary
    if not summary.get("sampling") or summary.get("protocol") != collection.protocol:
        return False
    return collection.sampling in run.ways(summary["sampling"])


def by_validation(collection: Collection) -> bool:
    """Whether samples are compared with validation images, by which runs may have been chosen."""
    return collection.protocol.get("reference") == "validation"
