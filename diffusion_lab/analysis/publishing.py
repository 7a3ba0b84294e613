"""The command `publish`: from run folders to a small folder that checks their comparison."""

import csv
import json
import math
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig, OmegaConf

import diffusion_lab
from diffusion_lab.assembly.config_keys import as_list, flat
from diffusion_lab.common import files, hashing
from diffusion_lab.common.formats import csv_text, literal, literal_table
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.metrics.extractor.classifier import halved, name_of
from diffusion_lab.report.frame import Collection, collect
from diffusion_lab.report.records import Run, facts_in
from diffusion_lab.report.tables import ArmTable
from diffusion_lab.report.words import ended
from diffusion_lab.runs import published
from diffusion_lab.runs.current import CHECKPOINT, CurrentWeights
from diffusion_lab.runs.files import CONFIG, METRICS, SUMMARY, read_config
from diffusion_lab.runs.published import CARD, has_card
from diffusion_lab.runs.results import EVALUATIONS
from diffusion_lab.runs.summary import Summary, load_summary
from diffusion_lab.training.tuned import FOLDER, FOUND

TEXT, RUNS_CSV, RUNS = "card.md", "runs.csv", "runs"
OWN = (CARD, TEXT, RUNS_CSV, RUNS, FOLDER)  # what publish writes, besides classifiers
RECORDS = (CONFIG, METRICS, SUMMARY, "memorization/report.json")
SWEEPS = "sweeps/*/results.csv"  # samplings in more ways
LARGEST = 200_000  # bytes of metrics.jsonl, above which rows of training losses are left out
PLACE = ("step", "epoch", "images", "seconds")  # keys of a row that say where it belongs
SOURCES = ("first_stage.run", "objective.teacher.run", "init_from")  # runs that a run began from
TUNING = (
    "of",
    "values",
    "metric",
    "seeds",
    "images",
    "num_samples",
    "trials",
    "grow",
    "overrides",
    "study",
)
MACHINE = ("git_commit", "device", "processor", "precision", "threads", "ranks", "python")
CLASSIFIER = name_of("")  # begins the names of classifiers in names of metrics
Facts = dict[str, Any]


def publish_runs(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Publishes the runs at or below `cfg.paths` in the folder `cfg.output`."""
    paths = [str(path) for path in as_list(cfg.paths)]
    if not paths:
        raise UserError(
            "give the folders of studies: diffusion-lab publish outputs/NAME output=FOLDER"
        )
    if not cfg.output:
        raise UserError("output is missing; write the folder to publish to, as in output=published")
    return publish(paths, str(cfg.output))


def publish(paths: Sequence[str], output: str) -> dict[str, object]:
    """Writes what a reader needs to check the comparison of the run folders at or below `paths`.

    Raises UserError, before anything is written, if there is no finished run, if the runs were
    measured in different ways, or if `output` has files that `publish` did not write.
    """
    folder = Path(output)
    require_apart(paths, folder)
    found = collect(paths)
    runs = places_of(paths, [run.folder for run in found.runs])
    tunings = tunings_of(found.runs)
    tuning_runs, left_out = {}, [*map(str, found.left_out)]
    for tuning, place in tunings.items():
        for run in sorted(path.parent for path in tuning.glob(f"*/{CONFIG}")):
            if load_summary(run).finished:
                tuning_runs[run] = f"{place}/{run.name}"
            else:
                left_out.append(f"{run} is left out: it is an unfinished tuning run")
    with files.replacing_folder(folder) as new:
        thinned = {
            name: facts
            for run, name in {**runs, **tuning_runs}.items()
            if (facts := copy_records(run, new / name))
        }
        for tuning, name in tunings.items():
            (new / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tuning / FOUND, new / name / FOUND)
        card = card_of(found, runs, tunings, tuning_runs)
        card |= {"classifiers": copy_classifiers(found.runs, new), "thinned": thinned}
        card["left_out"] = left_out
        for study in holding(paths):  # readers do not have these paths
            card["left_out"] = [each.replace(f"{study}/", "") for each in card["left_out"]]
        table = ArmTable(found)
        files.write_atomically(new / RUNS_CSV, table.runs_csv(runs))
        files.write_json(new / CARD, card)
        files.write_atomically(new / TEXT, text_of(card, table.markdown()))
    missing = [each["name"] for each in card["classifiers"] if not each["file"]]
    for sentence in left_out:
        say(sentence)
    for name in missing:
        say(f"{name} is not published: no file in metrics.classifier of these runs is this one")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"Published {len(runs)} runs, {size / 1000:,.0f} kB: {folder / TEXT}")
    facts = {"folder": str(folder), "runs": len(runs), "bytes": size}
    return facts | {"left_out": left_out, "missing_classifiers": missing}


def require_apart(paths: Iterable[str], output: Path) -> None:
    """Raises UserError if a path is published already or in `output`, or that is another's."""
    place = output.resolve()
    for path in map(Path, paths):
        if has_card(path):
            raise UserError(f"{path} was written by publish; copy the folder to publish it again")
        inside, around = place.is_relative_to(path.resolve()), path.resolve().is_relative_to(place)
        if inside or around:
            raise UserError(
                f"output={output} {'lies in' if inside else 'contains'} {path}, which is to be "
                "published; choose a folder beside it"
            )
    files.require_own(output, has_card)
    there = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if strange := [n for n in there if n not in OWN and not n.startswith(CLASSIFIER)]:
        raise UserError(
            f"output={output} contains {strange[0]}, which publish did not write; move it away, or "
            "choose another folder"
        )


def holding(paths: Iterable[str]) -> list[Path]:
    """The folders that hold the runs: the paths, or the parents of those that are runs."""
    return [path.parent if (path / CONFIG).is_file() else path for path in map(Path, paths)]


def places_of(paths: Iterable[str], runs: Iterable[Path]) -> dict[Path, str]:
    """The place of each run, such as runs/seed-0; raises UserError if two would have one."""
    studies = list(dict.fromkeys(folder.resolve() for folder in holding(paths)))
    found: dict[str, Path] = {}
    for run in runs:
        # a run may be a link
        study, inside = next(
            (study, place.relative_to(study))
            for place in (run.parent.resolve() / run.name, run.resolve())
            for study in studies
            if place.is_relative_to(study)
        )
        name = Path(RUNS, study.name if len(studies) > 1 else "", inside).as_posix()
        if name in found:
            raise UserError(
                f"{found[name]} and {run} would both be {name} in the published folder; "
                "rename one of their folders, or publish them separately"
            )
        found[name] = run
    return {run: name for name, run in found.items()}


def tunings_of(runs: Iterable[Run]) -> dict[Path, str]:
    """The place of each folder with the tuning runs that `runs` name, such as tuning."""
    found: set[Path] = set()
    for run in runs:
        # by its way from the run, with which it may have been moved
        if file := run.part("tuning").get("file"):
            path = run.folder / os.path.relpath(file, run.config.run_dir)
            found |= {path.resolve().parent} if path.is_file() else set()
    base = os.path.commonpath(found) if found else ""
    return {
        Path(os.path.relpath(each)): (Path(FOLDER) / each.relative_to(base)).as_posix()
        for each in sorted(found)
    }


def copy_records(run: Path, target: Path) -> Facts | None:
    """Copies the records of a run; returns how many rows were left out of its metrics, or None.

    Evaluations of other weights than the run's current ones are not copied, but for rows of sweeps
    whose step says so.
    """
    if published.is_published(run):
        shutil.copytree(run, target, ignore=shutil.ignore_patterns(".*"))
        return published.facts_of(run).get(published.THINNED)
    weights = CurrentWeights(run)
    evaluations = [
        p for p in run.glob(f"{EVALUATIONS}/*.json") if weights.match(files.read_json(p))
    ]
    for path in run.glob(SWEEPS):
        copy_sweep(path, target / path.relative_to(run), weights)
    for path in (*(run / name for name in RECORDS), *evaluations):
        if path.is_file():
            copy = target / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    thinned = thin(target / METRICS)
    published.mark(target, weights.sha256, thinned)
    return thinned


def copy_sweep(path: Path, copy: Path, weights: CurrentWeights) -> None:
    """Copies the results of a sweep; a row of an older table does not say whose weights it has."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        columns, found = list(rows.fieldnames or ()), list(rows)
    if CHECKPOINT in columns:
        found = [
            row
            for row in found
            if not row[CHECKPOINT] or row.get("step", "null") != "null" or weights.match(row)
        ]
    if found:
        copy.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(copy, csv_text(columns, [[*row.values()] for row in found]))


def thin(path: Path) -> Facts | None:
    """Leaves out rows of training losses, evenly, if a file is too large; says how many, or None.

    Rows with anything else stay, and so do the ones beside them, whose times plots use.
    """
    if not path.is_file() or path.stat().st_size <= LARGEST:
        return None
    rows = files.read_rows(path)
    lines = [json.dumps(row) + "\n" for row in rows]
    losses = [all(key in PLACE or key.startswith("train") for key in row) for row in rows]
    measured = {row.get("images") for row, loss in zip(rows, losses, strict=True) if not loss}
    droppable = [i for i, row in enumerate(rows) if losses[i] and row.get("images") not in measured]
    size = sum(len(lines[place]) for place in droppable)
    # a quarter at least, even if the other rows alone are too many
    room = max(LARGEST - (sum(map(len, lines)) - size), LARGEST // 4)
    dropped = set(droppable) - set(droppable[:: max(1, -(-size // room))])
    files.write_atomically(path, "".join(line for i, line in enumerate(lines) if i not in dropped))
    return {"rows": len(rows), "kept": len(rows) - len(dropped)} | facts_in(rows)


def copy_classifiers(runs: Sequence[Run], folder: Path) -> list[Facts]:
    """Writes the classifiers that metrics of `runs` name, if still there; returns their facts."""
    keys = ("metrics.classifier", "metrics.extractor.path")
    paths = {OmegaConf.select(run.config, key) for run in runs for key in keys}
    known = {path: hashing.of_file(Path(path)) for path in paths if path and Path(path).is_file()}
    originals = {name_of(checksum): path for path, checksum in known.items()}
    metrics = {name for run in runs for record in run.kept for name in record["metrics"]}
    named = {part for name in metrics for part in name.split("/")[1:2]}
    found = []
    for name in sorted(each for each in named if each.startswith(CLASSIFIER)):
        path = originals.get(name)
        if path:
            files.write_atomically(folder / f"{name}.safetensors", halved(Path(path)))
        file = f"{name}.safetensors" if path else None
        found.append({"name": name, "file": file, "sha256_of_original": path and known[path]})
    return found


def card_of(
    collection: Collection,
    places: Mapping[Path, str],
    tunings: Mapping[Path, str],
    tuning_runs: Mapping[Path, str],
) -> Facts:
    """The facts of a card; the mappings have the places of runs, of tunings and of their runs."""
    runs = collection.runs
    trained = {places[run.folder]: run.summary for run in runs if not run.drawn_elsewhere}
    tuned = [load_summary(folder) for folder in tuning_runs]
    sources = sources_of(runs)
    everything = [*trained.values(), *tuned, *sources.values()]
    known = [own for summary in trained.values() if (own := summary.overrides) is not None]
    common = [word for word in (known or [[]])[0] if all(word in own for own in known)]
    kinds = {"runs": [*trained.values()], "tuning": tuned, "before": [*sources.values()]}
    tuning = next((part for run in runs if (part := run.part("tuning"))), {})
    protocols = [part for run in runs if (part := run.part("protocol"))]
    return {
        "written_by": {"command": published.WRITER, "version": diffusion_lab.__version__},
        "compositions": {a.name: [places[r.folder] for r in a.runs] for a in collection.arms},
        "seeds": sorted({run.seed for run in runs}),
        "study_protocols": [p for i, p in enumerate(protocols) if p not in protocols[:i]],
        "protocol": collection.protocol,
        "sampling": collection.sampling,
        "jumps": [arm.name for arm in collection.arms if arm.runs[0].summary.jumps],
        "common": common,
        "commands": {
            place: own and [word for word in own if word not in common]
            for place, own in ((place, summary.overrides) for place, summary in trained.items())
        },
        "machines": machines_of(everything),
        "sources": {
            folder: {"images_seen": each.images_seen, "training_seconds": each.training_seconds}
            for folder, each in sources.items()
        },
        "hours": {kind: hours_of(own) for kind, own in (kinds | {"total": everything}).items()},
        "dates": sorted(str(summary.ended_at) for summary in [*trained.values(), *tuned]),
        "tuning": {key: tuning[key] for key in TUNING if key in tuning},
        "chosen": {
            f"{place}/{FOUND}": {
                k: each["chosen"] for k, each in files.read_json(folder / FOUND).items()
            }
            for folder, place in tunings.items()
        },
    }


def sources_of(runs: Iterable[Run]) -> dict[str, Summary]:
    """Summaries of first stages and teachers that runs began from, by folder, if still there."""
    found = {}
    for run in runs:
        saved = read_config(run.folder)  # opened, it names copies
        for folder in filter(None, (OmegaConf.select(saved, key) for key in SOURCES)):
            # a resumed run has its own copy of the first stage
            if folder not in found and Path(folder).resolve() != run.folder.resolve():
                found[str(folder)] = load_summary(Path(folder))
    return {folder: summary for folder, summary in found.items() if summary != Summary()}


def machines_of(summaries: Iterable[Summary]) -> list[Facts]:
    """The distinct commits, machines and versions, each with its number of runs."""
    keys = (*MACHINE, "versions")
    counts = Counter(json.dumps({key: getattr(each, key) for key in keys}) for each in summaries)
    return [json.loads(text) | {"runs": count} for text, count in counts.items()]


def hours_of(summaries: Sequence[Summary]) -> Facts:
    """The hours of some runs together; a sum is null if a run has not recorded its part.

    Core-hours are training time x threads x processes; wall-clock hours include measurements.
    """
    unknown = math.nan
    wall = sum(each.wall_seconds or unknown for each in summaries) / 3600
    core = sum(
        (each.training_seconds or unknown) * (each.threads or unknown) * (each.ranks or 1)
        for each in summaries
    )
    hours = {"wall_clock_hours": wall, "core_hours": core / 3600}
    return {"runs": len(summaries)} | {
        key: None if math.isnan(own) else round(own, 4) for key, own in hours.items()
    }


def text_of(card: Facts, table: str) -> str:
    """The card as Markdown; `table` is the comparison's table."""
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"literal": literal, "join_words": shlex.join, "ended": ended, "flat": flat}

    def rows(head: list[str], cells: Iterable[Sequence[object]]) -> str:
        return literal_table(head, (["null" if c is None else c for c in row] for row in cells))

    return page.get_template("card.md.jinja").render(table=table, rows=rows, **card)
