"""The command `compare`: a folder with a self-contained page, tables and figures, and a W&B run."""

import base64
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from diffusion_lab.assembly.config_keys import CLASS, as_list
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.common.files import require_own, write_atomically
from diffusion_lab.common.formats import literal
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Range, optional
from diffusion_lab.metrics.quantity import VALIDATION_LOSS
from diffusion_lab.report import verdicts
from diffusion_lab.report.arms import Arm, runs_of
from diffusion_lab.report.comparison import Report
from diffusion_lab.report.facts import machine, setting
from diffusion_lab.report.figures import COLOURS, MARKERS, marker
from diffusion_lab.report.frame import collect
from diffusion_lab.report.records import AUTOENCODER, Run
from diffusion_lab.report.tables import NONE, pairs_csv, samplings_csv
from diffusion_lab.report.words import ended
from diffusion_lab.runs.files import SAMPLES, load_record

PARTS, PLOTS = Path(__file__).parent, "plots"
GENERATOR = "diffusion-lab compare"  # marks a page that `compare` wrote
HEADLINE = ("fid", "kid", "classifier_fid", "accuracy", "recall", "copy_ratio", "test_loss")
MAIN = 6  # most columns of numbers in the first table
GAP, ENLARGED = 2, 2  # pixels between images of a grid, and how many times its PNG is enlarged
ALL_BYTES = 5_000_000  # limit of all pictures together, as data URIs in the page
ROWS, OF_EACH = 10, 2  # classes in a strip, and samples of each
SMALLEST = 32  # pixels of the longer side, below which no picture shrinks
WHITE = OPAQUE = 255
PROJECT = Range(
    "the name of a W&B project",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[^/\\#?%:]+", value)),
    "diffusion-lab",
)
TABLES = {"compositions": "table.csv", "runs": "runs.csv", "pairs": "pairs.csv"}
VERDICT, COMPARISON = "verdict", "comparison"  # start the names of answers, and of tables and page


def compare(paths: Sequence[str], output: str) -> dict[str, object]:
    """Compares the run folders at or below `paths`; writes the folder `output`.

    Raises UserError, before anything is written, if there is no run, if the runs were measured in
    different ways, or if `output` contains other files.
    """
    folder = Path(output)
    require_own(folder, is_ours)
    found = collect(paths)
    report = Report(found)
    compared, earlier = {str(run.folder) for run in found.runs}, folder / "runs.csv"
    known = pd.read_csv(earlier, usecols=["folder"]).folder if earlier.exists() else ()
    if others := sorted({*known} - compared):
        say(f"{folder} was of other runs, such as {others[0]}, and is replaced")
        say("  output=... keeps both")
    write(folder, report)
    left_out = [str(fact) for fact in found.left_out]
    for sentence in (*left_out, report.answer):
        say(ended(sentence))
    for sentence in report.sentences:
        say(f"  {ended(sentence)}")
    say(f"Page, tables and figures: {folder / 'index.html'}")
    return {
        "folder": str(folder),
        "verdict": report.answers,
        "compositions": {arm.name: [str(run.folder) for run in arm.runs] for arm in found.arms},
        "left_out": left_out,
    }


def write(folder: Path, report: Report) -> None:
    """Writes every file, and deletes the figures of an earlier comparison."""
    text = render(report)
    folder.mkdir(parents=True, exist_ok=True)
    # first, as it marks the folder as one that a later comparison may replace
    write_atomically(folder / "index.html", text)
    (folder / PLOTS).mkdir(exist_ok=True)
    drawings = [*report.figures, *report.laws, *chain(*report.folded.values())]
    kinds = ("tuning", "best_so_far", *report.found.metrics, VALIDATION_LOSS.name)
    names = [f"{drawing.name}.svg" for drawing in drawings]
    laws = [each.table for each in report.scaling]
    for old in (folder / PLOTS).glob("*.svg"):
        if old.name not in names and old.name.startswith(kinds):
            old.unlink()
    files = {
        "table.md": in_markdown(report),
        "table.csv": report.table.csv(),
        "table.tex": report.table.latex(),
        "runs.csv": report.table.runs_csv(),
        "pairs.csv": pairs_csv(report.panels, [*chain(*report.others.values())]),
        "samplings.csv": samplings_csv(report.found) if report.by_sampling else None,
        "scaling.csv": pd.concat(laws).to_csv(index=False) if laws else None,
        **{f"{PLOTS}/{drawing.name}.svg": drawing.file for drawing in drawings},
    }
    for name, content in files.items():
        if content is None:  # not in this comparison, but maybe in an earlier one
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomically(folder / name, content)


def in_markdown(report: Report) -> str:
    """The table and every sentence."""
    said = [*report.sentences, *report.notes, *map(str, report.found.left_out)]
    question = report.found.study.get("question")
    parts = [f"**{literal(question)}**"] if question else []
    parts += [literal(setting(report.found)), report.table.markdown()]
    parts += [literal(ended(report.answer))]
    parts += [f"With {table.way}:\n\n{table.markdown()}" for table in report.by_sampling]
    parts += ["\n".join(f"* {literal(ended(sentence))}" for sentence in said)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


@dataclass(frozen=True)
class Samples:
    """The grid of one run of an arm, and a strip of two samples per class, as data URIs."""

    arm: Arm
    run: Run
    grid: str
    strip: str | None


def agreement(report: Report, name: str) -> list[tuple[str, str, str]]:
    """By another metric: each arm, whether it is behind the best one, and the gap."""
    best, cells = {panel.data: panel.arms[0] for panel in report.panels}, []
    for panel in report.others[name]:
        ours = best.get(panel.data, "")
        for arm in panel.arms:
            if pair := panel.pair(ours, arm):
                shown = "agrees" if pair.ahead == ours else "disagrees"
                says = shown if pair.low * pair.high > 0 else "no gap shown"
                place = f"{arm} at {panel.data}" if panel.data else arm
                cells.append((place, says, verdicts.interval(panel.metric, pair)))
    return cells


def render(report: Report) -> str:
    """Renders the page as HTML text."""
    found = report.found
    base = os.path.commonpath([os.path.abspath(run.folder.parent) for run in found.runs])
    drawn = samples(found.arms)
    # in the first table the metric that decides, then others that people read
    size = "training_images" if len({arm.data for arm in found.arms}) > 1 else "parameters"
    kinds = dict.fromkeys((size, report.panels[0].metric.name, *HEADLINE, *report.others))
    known = {column.kind: column for column in report.table.columns}
    # a single known value means that all grids have the same noise at each place
    noises = {grid_noise(each.run) for each in drawn}
    page = Environment(
        loader=FileSystemLoader(PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return page.get_template("page.html").render(
        report=report,
        title=found.study.get("question") or f"Comparison of {len(found.arms)} arms",
        arms=found.arms,
        samples=drawn,
        generator=GENERATOR,
        style=(PARTS / "page.css").read_text(),
        script=(PARTS / "page.js").read_text(),
        palette=len(COLOURS),
        shape=lambda place: MARKERS[marker(place)],
        verdicts=verdicts,
        none_known=NONE,
        ended=ended,
        columns=[known[kind] for kind in kinds if kind in known][:MAIN],
        strip={
            panels[0].metric.title: cells
            for name, panels in report.others.items()
            if (cells := agreement(report, name))
        },
        setting=setting(found),
        alike=len(noises) == 1 and None not in noises,
        of_each=OF_EACH,
        settings={key: [a.settings[key] for a in found.arms] for key in found.arms[0].settings},
        classes=CLASS,
        runs_folder=os.path.relpath(base),
        place=lambda run: os.path.relpath(run.folder, base),
        machines=Counter(map(machine, found.runs)),
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a comparison."""
    page = folder / "index.html"
    return page.is_file() and f'content="{GENERATOR}"' in page.read_text(errors="replace")[:2000]


def samples(arms: Sequence[Arm]) -> list[Samples]:
    """The grid of one run of each arm that draws some, of the same training seed where possible."""
    counts = Counter(run.seed for run in runs_of(arms))
    chosen = [min(arm.runs, key=lambda run: (-counts[run.seed], run.seed)) for arm in arms]
    found = [
        (arm, run, path)
        for arm, run in zip(arms, chosen, strict=True)
        if run.family != AUTOENCODER and (path := latest_grid(run.folder))
    ]
    share = ALL_BYTES // max(1, 2 * len(found))
    shown = []
    for arm, run, path in found:
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
        except (OSError, SyntaxError) as error:  # Pillow's, of a PNG
            say(f"The grid of {run.folder} is left out, as it cannot be read: {error}")
            continue
        pixels, strip = pixels[::ENLARGED, ::ENLARGED], None
        settings = grid_settings(run)
        if settings and (cells := cells_of(pixels, settings.columns)) is not None:
            line = [cell for row in cells[:ROWS] for cell in row[:OF_EACH]]
            strip = data_uri(side_by_side(line), share)
        shown.append(Samples(arm, run, data_uri(pixels, share), strip))
    return shown


def grid_settings(run: Run) -> DictConfig | None:
    """The settings of the callback that draws grids; None if the run draws none."""
    settings = filter(None, (run.config.get("callbacks") or {}).values())
    found = next((each for each in settings if each._target_.endswith(".SampleGrid")), None)
    # one that was added by hand has its defaults
    return None if found is None else DictConfig({"seed": 0, "columns": 10, **found})


def grid_noise(run: Run) -> str | None:
    """The settings that decide the noise of a run's grid, as JSON; None if it draws no grids."""
    if (settings := grid_settings(run)) is None:
        return None
    # a sampler may draw more noise, and the others are the classes and the space that is diffused
    parts = (
        *("sampler", "first_stage", "conditioning._target_", "data.pad"),
        *("data.source._target_", "data.source.path", "data.source.image_size"),
    )
    facts = [settings.seed, settings.columns, *(OmegaConf.select(run.config, p) for p in parts)]
    return json.dumps(facts, default=OmegaConf.to_container, sort_keys=True)


def latest_grid(folder: Path) -> Path | None:
    """The sample grid of the last step; None if there is none."""
    steps = {
        int(number): path
        for path in (folder / SAMPLES).glob("step_*.png")
        if (number := path.stem.removeprefix("step_")).isdecimal()
    }
    return steps[max(steps)] if steps else None


def cells_of(pixels: np.ndarray, columns: int) -> np.ndarray | None:
    """Splits a grid into its square images (rows, columns, h, w, ...); None if it is not a grid."""
    height, width, *channels = pixels.shape
    pitch, rest = divmod(width - GAP, columns)
    if rest or pitch <= GAP or (height - GAP) % pitch:
        return None
    cells = pixels[GAP:, GAP:].reshape(-1, pitch, columns, pitch, *channels).swapaxes(1, 2)
    lines = (pixels[:GAP], pixels[:, :GAP], cells[:, :, -GAP:], cells[:, :, :, -GAP:])
    if any((line != WHITE).any() for line in lines):
        return None
    return cells[:, :, :-GAP, :-GAP]


def side_by_side(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Joins images to a line (h, w, C + 1) with transparent gaps, wider after each `OF_EACH`."""
    parts = []
    for place, cell in enumerate(cells, 1):
        gap = 0 if place == len(cells) else GAP if place % OF_EACH else 2 * GAP
        solid = np.dstack([cell, np.full(cell.shape[:2], OPAQUE, np.uint8)])
        parts.append(np.pad(solid, ((0, 0), (0, gap), (0, 0))))
    return np.hstack(parts)


def data_uri(pixels: np.ndarray, most: int) -> str:
    """A picture as a PNG in a data URI of `most` characters at most, made smaller until it fits."""
    picture = Image.fromarray(pixels)
    while True:
        data = io.BytesIO()
        picture.save(data, "png", optimize=True)
        text = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        if len(text) <= most or max(picture.size) <= SMALLEST:
            return text
        picture = picture.reduce(2)


def compare_runs(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Compares the runs at or below `cfg.paths`; logs it to the W&B project `cfg.wandb`, if any."""
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


def log_comparison(folder: Path, project: str, result: dict[str, Any]) -> None:
    """Logs what `compare` wrote and returned to a W&B project; raises UserError if W&B fails."""
    # imported late, since reading records needs neither W&B nor torch
    import wandb

    from diffusion_lab.training.logger.run_logger import first_line, why_offline
    from diffusion_lab.training.logger.wandb_logger import artifact_of, offline, opened, staged_in

    runs = [run for each in result["compositions"].values() for run in each]
    loggers = [load_record(run).get("logger") or {} for run in runs]
    groups = {(each.get("wandb") or {}).get("group") for each in loggers} - {None}
    group = groups.pop() if len(groups) == 1 else None  # that all runs with one have
    place = {"project": project, "group": group, "job_type": "compare"}
    config = {"compositions": result["compositions"]}
    try:
        run, reason = opened(why_offline("auto"), folder, name=folder.name, config=config, **place)
        with staged_in(folder / "wandb"):
            tables = {name: table(folder / file) for name, file in TABLES.items()}
            shown: dict[str, Any] = {n: wandb.Table([*h], rows) for n, (h, rows) in tables.items()}
            shown["page"] = wandb.Html((folder / "index.html").read_text(), inject=False)
            run.log({f"{COMPARISON}/{name}": each for name, each in shown.items()})
            written = sorted(path for path in folder.rglob("*") if path.is_file())
            own = [path for path in written if path.relative_to(folder).parts[0] != "wandb"]
            run.log_artifact(artifact_of(f"{COMPARISON}-{run.id}", COMPARISON, folder, own))
        answers = {f"{VERDICT}/{metric}": said for metric, said in result["verdict"].items()}
        run.summary.update(answers)
        line = offline(reason, folder) if reason else f"W&B: {run.url}"
        run.finish()
    except Exception as error:  # of a key, a server, or a disk: each has its own class
        said = first_line(error)
        raise UserError(f"the comparison is in {folder}, but W&B failed: {said}") from error
    say(line)


def table(path: Path) -> tuple[list[str], list[list[float | str | None]]]:
    """The columns and rows of a CSV file, with its numbers as numbers."""
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, [[*row] for row in zip(*map(column_of, zip(*rows, strict=True)), strict=True)]


def column_of(cells: Sequence[str]) -> list[float | str | None]:
    """Cells as numbers if all are, as W&B wants one type in a column; None where one is empty."""
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError:
        return [cell or None for cell in cells]
