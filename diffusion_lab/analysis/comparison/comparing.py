"""From run folders to a folder with table, plots and page: everything that `compare` does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from diffusion_lab.analysis.comparison import curves, drawings, fairness, page, table
from diffusion_lab.analysis.comparison.candidates import Run, read, run_folders
from diffusion_lab.analysis.comparison.composition import losses_compare, settings_of
from diffusion_lab.analysis.comparison.data_sizes import arranged, crossings, data_lines
from diffusion_lab.analysis.comparison.groups import Group, Member, grouped
from diffusion_lab.analysis.comparison.measurements import (
    copy_ratios,
    figures_of,
    judged_by,
    names_of_figures,
)
from diffusion_lab.analysis.comparison.page import Judged, Report
from diffusion_lab.analysis.comparison.pictures import samples
from diffusion_lab.analysis.comparison.verdict import SHOWN, verdict
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.protocol import Protocol
from diffusion_lab.metrics.quantities import HELD_OUT
from diffusion_lab.runs.results import Sampling, common_metrics, sampling_of
from diffusion_lab.training.callbacks import Evaluation, configured

PLOTS = "plots"
COSTS = {"macs": "MACs of a call on one image", "training_seconds": "time of training, minutes"}


@dataclass(frozen=True)
class Collection:
    """Compositions with figures of one protocol and sampling; `names` are the figures' whole ones.

    `left_out` are sentences on runs that are not among them.
    """

    groups: list[Group]
    names: dict[str, str]
    protocol: Protocol
    sampling: Sampling
    omitted: list[str]  # sentences on figures that are left out
    left_out: list[str]


def compare_runs(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Compares the run folders of the command line, `cfg.paths`, in the folder `cfg.output`."""
    if not isinstance(cfg.paths, ListConfig):
        raise UserError(
            f"paths={cfg.paths} is no list of folders; write diffusion-lab compare {cfg.paths}"
        )
    if not cfg.paths:
        raise UserError(
            "give run folders, or folders that hold some: diffusion-lab compare outputs"
        )
    return compare([str(path) for path in cfg.paths], str(cfg.output))


def compare(paths: Sequence[str], output: str) -> dict[str, object]:
    """Compares the run folders at or below `paths`; writes the folder `output`.

    Raises UserError, before anything is written, if there is no run, or not all were measured
    alike, or `output` holds something else.
    """
    folder = Path(output)
    check_output(folder)
    collection = collect(paths)
    groups = collection.groups
    metrics = judged_by(fairness.runs_of(groups))
    judged = [each for metric in metrics if (each := judge(collection, metric)) is not None]
    notes = [*fairness.notes(groups), *collection.omitted]
    left_out = collection.left_out
    report = Report(groups, judged, samples(groups), setting(collection), notes, left_out)
    write(folder, report)
    tell(folder, report)
    return {
        "folder": str(folder),
        "verdict": {each.metric.name: each.verdict.answer for each in judged},
        "compositions": {
            group.name: [str(member.run.folder) for member in group.members] for group in groups
        },
        "left_out": left_out,
    }


def collect(paths: Sequence[str | Path]) -> Collection:
    """The compositions of the run folders at or below `paths`, by size of data and FID."""
    folders = run_folders(paths)
    say(f"{len(folders)} run folders")
    runs, left_out = read(folders)
    if not runs:
        raise UserError(f"there is nothing to compare: {'; '.join(left_out)}")
    protocol, sampling, measured = common_metrics({run.folder: run.kept for run in runs})
    names = names_of_figures(list(measured.values()))
    copies, omitted = copy_ratios(runs, sampling)
    if not (one_loss := losses_compare(runs)):
        omitted.append(
            "Held-out losses are left out: objective, schedule, data or first stage differ, which "
            "makes them different quantities"
        )
    members = []
    for run in runs:
        figures = figures_of(run, measured[run.folder], names) | copies.get(run.folder, {})
        if not one_loss:
            figures.pop(HELD_OUT.name, None)
        members.append(Member(run, settings_of(run), figures))
    groups, repeated = grouped(members)
    groups.sort(key=lambda group: group.mean("fid") if group.values("fid") else math.inf)
    groups = arranged(groups)
    return Collection(groups, names, protocol, sampling, omitted, left_out + repeated)


def check_output(folder: Path) -> None:
    """Raises UserError if `folder` is a file, or holds anything but a comparison."""
    if folder.is_file():
        raise UserError(f"output={folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not page.is_ours(folder):
        raise UserError(f"output={folder} holds other files; choose another folder by output=...")


def judge(collection: Collection, metric: Quantity) -> Judged | None:
    """Verdict and plots by one metric; None where no run has it."""
    groups = collection.groups
    said = verdict(groups, metric)
    if said is None:
        return None
    trained = [
        (group, curves.curve(group, metric.name, name_in_rows(collection, group, metric)))
        for group in groups
    ]
    axes = curves.AXES if any(len(points) > 1 for _, points in trained) else ()
    along = [drawings.along(trained, metric, axis) for axis in axes]
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
    """A metric's name in metrics.jsonl, if it was measured there as it is compared here."""
    if metric.name == HELD_OUT.name:
        return "val/loss"
    way = (collection.protocol, collection.sampling)
    own = all(measured_so(member.run, *way) for member in group.members)
    return collection.names.get(metric.name) if own else None


def measured_so(run: Run, protocol: Protocol, sampling: Sampling) -> bool:
    """Whether a run was measured in training as it is now compared."""
    evaluation = configured(run.config, Evaluation)
    if run.summary.get("protocol") != protocol or not evaluation:
        return False
    return sampling_of(run.config) | {"seed": evaluation.seed} == sampling


def setting(collection: Collection) -> str:
    """What was measured how, in a line."""
    groups, protocol, sampling = collection.groups, collection.protocol, collection.sampling
    runs = [member.run for group in groups for member in group.members]
    data = sorted({run.config.data.source["_target_"].rpartition(".")[2] for run in runs})
    parts = [
        f"{len(runs)} runs on {', '.join(data)}",
        f"{protocol['num_samples']:,} samples of each against {protocol['reference_images']:,} "
        f"training images, by features of {protocol['extractor']}",
    ]
    sampler: Any = sampling["sampler"]
    guidance: Any = sampling["guidance"]
    drawn = sampler["_target_"].rpartition(".")[2]
    if sampler.get("steps"):
        drawn += f" of {sampler['steps']} steps"
    scale = guidance.get("scale")
    parts.append(f"{drawn}, guidance scale {scale}, sampling seed {sampling['seed']}")
    return "; ".join(parts) + f" [protocol {protocol['fingerprint']}]"


def write(folder: Path, report: Report) -> None:
    """Writes every file, the page last; plots of an earlier comparison go."""
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    first = report.judged[0]
    text = f"{report.setting}\n\n{table.markdown(report.groups)}\n{first.verdict.answer}.\n"
    said = [*told(first), *report.notes, *report.left_out]
    text += "".join(f"\n* {sentence.rstrip('.')}." for sentence in said) + "\n"
    write_atomically(folder / "table.md", text)
    write_atomically(folder / "table.csv", table.as_csv(report.groups))
    write_atomically(folder / "table.tex", table.latex(report.groups))
    tests = {each.metric.name: each.verdict.pairs for each in report.judged}
    write_atomically(folder / "pairs.csv", table.pairs_csv(tests))
    plots = {f"{plot.name}.svg": plot for each in report.judged for plot in each.drawings}
    kinds = tuple(metric.name for metric in judged_by(fairness.runs_of(report.groups)))
    for old in (folder / PLOTS).glob("*.svg"):
        if old.name not in plots and old.name.startswith(kinds):
            old.unlink()
    for name, plot in plots.items():
        write_atomically(folder / PLOTS / name, plot.file)
    write_atomically(folder / "index.html", page.render(report))


def told(judged: Judged) -> list[str]:
    """What stands below the answer."""
    said = judged.verdict
    return [*said.by_size, *judged.crossed, *said.findings[:SHOWN], *said.reservations]


def tell(folder: Path, report: Report) -> None:
    """What people want to know first."""
    for sentence in report.left_out:
        say(sentence)
    first = report.judged[0]
    say(f"{first.verdict.answer}.")
    for sentence in told(first):
        say(f"  {sentence}.")
    say(f"Table, plots and page: {folder / 'index.html'}")
