"""The command `publish`: from run folders to a small folder that checks their comparison."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from diffusion_lab.analysis.publishing import card as cards
from diffusion_lab.analysis.publishing.classifiers import publish_classifiers
from diffusion_lab.analysis.publishing.places import Places, of_tunings
from diffusion_lab.analysis.publishing.records import copy_records
from diffusion_lab.analysis.publishing.text import text_of
from diffusion_lab.build.config_keys import as_list
from diffusion_lab.common.files import read_json, write_atomically, write_json
from diffusion_lab.common.folders import replacing_folder, require_own
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.report.frame import Collection, collect
from diffusion_lab.report.tables import ArmTable
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.published import CARD, checksums, has_card
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.training.tuned import FOUND

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
