"""The command `publish`: from run folders to a small folder that checks their comparison."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.analysis.publishing import card as cards
from diffusion_lab.analysis.publishing.card import text_of
from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.common import hashing
from diffusion_lab.common.files import (
    read_json,
    read_rows,
    replacing_folder,
    require_own,
    write_atomically,
    write_json,
)
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.metrics.extractor.classifier import halved, name_of
from diffusion_lab.report.frame import Collection, collect
from diffusion_lab.report.records import Run, median_rate, spike_in
from diffusion_lab.report.tables import ArmTable
from diffusion_lab.runs import published
from diffusion_lab.runs.current import CurrentWeights
from diffusion_lab.runs.files import CONFIG, METRICS, SUMMARY
from diffusion_lab.runs.published import CARD, checksums, has_card
from diffusion_lab.runs.results import EVALUATIONS
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.training.tuned import FOLDER, FOUND

RUNS = "runs"  # the folder of runs in a published folder; tuning is in FOLDER


@dataclass(frozen=True)
class Places:
    """The folders that are published; `studies` are those that hold runs, without repetition."""

    studies: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Sequence[str | Path]) -> "Places":
        """The places of these run folders, or folders that contain some."""
        found: dict[Path, Path] = {}
        for path in map(Path, paths):
            holding = path.parent if (path / CONFIG).is_file() else path
            found.setdefault(holding.resolve(), holding)
        return cls(tuple(found.values()))

    def name(self, folder: Path) -> str:
        """The place of a folder in its study; it begins with the study if there are several."""
        # a study and a run in it may be given by different paths, and a run may be a link
        study, inside = next(
            (study, Path(place(folder)).relative_to(place(study)))
            for place in (os.path.abspath, os.path.realpath)
            for study in self.studies
            if Path(place(folder)).is_relative_to(place(study))
        )
        several = len(self.studies) > 1
        return (Path(study.resolve().name if several else "") / inside).as_posix()

    def of_runs(self, folders: Sequence[Path]) -> dict[Path, str]:
        """The place of each run, such as runs/seed-0; raises UserError if two would have one."""
        found: dict[str, Path] = {}
        for folder in folders:
            name = f"{RUNS}/{self.name(folder)}"
            if name in found:
                raise UserError(
                    f"{found[name]} and {folder} would both be {name} in the published folder; "
                    "rename one of their folders, or publish them separately"
                )
            found[name] = folder
        return {folder: name for name, folder in found.items()}

    def without_paths(self, sentence: str) -> str:
        """A sentence on runs without the paths of the studies, which readers do not have."""
        for study in self.studies:
            sentence = sentence.replace(f"{study}/", "")
        return sentence


def of_tunings(runs: Iterable[Run]) -> dict[Path, str]:
    """The place of each folder with the tuning runs that `runs` name, such as tuning."""
    found: set[Path] = set()
    for run in runs:
        # by its way from the run, with which it may have been moved
        if file := (run.part("tuning") or {}).get("file"):
            path = run.folder / os.path.relpath(file, run.config.run_dir)
            found |= {path.resolve().parent} if path.is_file() else set()
    if len(found) == 1:
        return {Path(os.path.relpath(found.pop())): FOLDER}
    return {
        Path(os.path.relpath(each)): f"{FOLDER}/{each.relative_to(os.path.commonpath(found))}"
        for each in sorted(found)
    }


LARGEST = 200_000  # bytes of metrics.jsonl, above which rows of training losses are left out
REPORT = "memorization/report.json"
SWEEPS = "sweeps/*/results.csv"  # samplings in more ways
PLACE = ("step", "epoch", "images", "seconds")  # keys of a row that say where it belongs


def copy_records(run: Path, target: Path) -> None:
    """Copies the records of a run, or of a first stage, to the new folder `target`, and seals them.

    Evaluations of other weights than the run's current ones are not copied. A run that was
    published before keeps its seal.
    """
    if published.is_published(run):
        shutil.copytree(run, target, ignore=lambda folder, names: unsealed(run, folder, names))
        return
    weights = CurrentWeights(run)
    matching = [
        path.relative_to(run).as_posix()
        for path in sorted((run / EVALUATIONS).glob("*.json"))
        if weights.match(read_json(path))
    ]
    sweeps = [path.relative_to(run).as_posix() for path in sorted(run.glob(SWEEPS))]
    for name in (CONFIG, METRICS, SUMMARY, REPORT, *matching, *sweeps):
        if (run / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, target / name)
    published.seal(target, weights.sha256, thin(target / METRICS))


def unsealed(run: Path, folder: str, names: list[str]) -> set[str]:
    """The files in a folder of a published run that do not belong to its records, as a lock."""
    sealed = {published.PUBLISHED, *published.facts_of(run)[published.FILES]}
    paths = {name: Path(folder) / name for name in names}
    return {
        name
        for name, path in paths.items()
        if path.is_file() and path.relative_to(run).as_posix() not in sealed
    }


def thin(path: Path) -> dict[str, object] | None:
    """Leaves out rows of training losses, evenly, if a file is too large; says how many, or None.

    Rows with anything else stay, and so do the ones beside them, whose times plots use.
    """
    if not path.is_file() or path.stat().st_size <= LARGEST:
        return None
    rows = read_rows(path)
    lines = [json.dumps(row) + "\n" for row in rows]
    measured = {row.get("images") for row in rows if not of_training(row)}
    droppable = [
        place
        for place, row in enumerate(rows)
        if of_training(row) and row.get("images") not in measured
    ]
    losses = sum(len(lines[place]) for place in droppable)
    # a quarter at least, even if the other rows alone are too many
    room = max(LARGEST - (sum(map(len, lines)) - losses), LARGEST // 4)
    dropped = set(droppable) - set(droppable[:: max(1, -(-losses // room))])
    kept = [line for place, line in enumerate(lines) if place not in dropped]
    write_atomically(path, "".join(kept))
    left_out = {"rows": len(rows), "kept": len(kept)}
    return left_out | {published.RATE: median_rate(rows), published.SPIKE: spike_in(rows)}


def of_training(row: dict) -> bool:
    """Whether a row of metrics.jsonl has nothing but what training logs between evaluations."""
    return all(key in PLACE or key.startswith(("train/", "train_")) for key in row)


OF_CLASSIFIER = name_of("")  # begins the names of classifiers in names of metrics


def publish_classifiers(runs: Sequence[Run], folder: Path) -> list[dict[str, object]]:
    """Writes the classifiers that metrics of `runs` name; returns their facts for the card.

    The file of one that is not where the runs' configurations say is null.
    """
    checksums = {path: hashing.of_file(path) for path in files_of(runs)}
    files = {name_of(checksum): path for path, checksum in checksums.items()}
    found: list[dict[str, object]] = []
    for name in sorted(named_by(runs)):
        facts: dict[str, object] = {"name": name, "file": None, "sha256": None}
        original = files.get(name)
        if original:
            facts["file"] = f"{name}.safetensors"
            content = halved(original)
            facts["sha256"] = hashing.of_bytes(content)
            write_atomically(folder / f"{name}.safetensors", content)
        found.append(facts | {"sha256_of_original": original and checksums[original]})
    return found


def named_by(runs: Iterable[Run]) -> set[str]:
    """The names of the classifiers in the full names of all metrics."""
    metrics = {name for run in runs for record in run.kept for name in record["metrics"]}
    parts = {part for name in metrics for part in name.split("/")[1:2]}
    return {part for part in parts if part.startswith(OF_CLASSIFIER)}


def files_of(runs: Iterable[Run]) -> set[Path]:
    """The existing files that the runs' configurations use as classifiers."""
    keys = ("metrics.classifier", "metrics.extractor.path")
    paths = {OmegaConf.select(run.config, key) for run in runs for key in keys}
    return {Path(path) for path in paths if path and Path(path).is_file()}


RUNS_CSV = "runs.csv"
NOT_LISTED = (CARD, cards.TEXT)  # files without a checksum in the card


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
    check_paths(paths, folder)
    check_output(folder)
    collection, places = collect(paths), Places.of(paths)
    runs = places.of_runs([run.folder for run in collection.runs])
    tunings = of_tunings(collection.runs)
    tuning_runs, unfinished = runs_of_tunings(tunings)
    left_out = [*map(str, collection.left_out), *unfinished]
    with replacing_folder(folder) as new:
        for run, name in {**runs, **tuning_runs}.items():
            copy_records(run, new / name)
        for tuning, name in tunings.items():
            (new / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tuning / FOUND, new / name / FOUND)
        table = ArmTable(collection)
        write_atomically(new / RUNS_CSV, table.runs_csv(runs))
        classifiers = publish_classifiers(collection.runs, new)
        card = cards.card_of(collection, runs, tunings, tuning_runs)
        card |= {
            "classifiers": classifiers,
            "left_out": [places.without_paths(each) for each in left_out],
            "thinned": cards.thinned_in(new),
            "sha256": checksums(new, without=()),
        }
        write_json(new / CARD, card)
        write_atomically(new / cards.TEXT, text_of(card, table.markdown()))
    return report(collection, folder, card, left_out)


def report(
    collection: Collection, folder: Path, card: cards.Facts, left_out: list[str]
) -> dict[str, object]:
    """Says what was published and left out; returns it, too."""
    for sentence in left_out:
        say(sentence)
    classifiers = card["classifiers"]
    assert isinstance(classifiers, list)
    missing = [each["name"] for each in classifiers if not each["file"]]
    for name in missing:
        say(f"{name} is not published: no file in metrics.classifier of these runs is this one")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    count = len(collection.runs)
    say(f"Published {count} runs, {size / 1000:,.0f} kB: {folder / cards.TEXT}")
    return {
        "folder": str(folder),
        "runs": count,
        "bytes": size,
        "left_out": left_out,
        "missing_classifiers": missing,
    }


def check_paths(paths: Sequence[str], output: Path) -> None:
    """Raises UserError if a path is published already, or lies in the output or around it."""
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


def check_output(output: Path) -> None:
    """Raises UserError if there is something at `output` that `publish` did not write."""
    require_own(output, has_card)
    listed = read_json(output / CARD).get("sha256", {})
    there = (path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    if strange := sorted(set(there) - {*listed, *NOT_LISTED}):
        raise UserError(
            f"output={output} contains {strange[0]}, which publish did not write; move it away, or "
            "choose another folder"
        )


def runs_of_tunings(tunings: dict[Path, str]) -> tuple[dict[Path, str], list[str]]:
    """The places of finished tuning runs, and a sentence on each other run beside them."""
    places, left_out = {}, []
    for folder, place in tunings.items():
        for run in sorted(path.parent for path in folder.glob(f"*/{CONFIG}")):
            if load_summary(run).finished:
                places[run] = f"{place}/{run.name}"
            else:
                left_out.append(f"{run} is left out: it is an unfinished tuning run")
    return places, left_out
