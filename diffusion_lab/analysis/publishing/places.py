"""The place of each run in a published folder, by its place in the folders that are published."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_lab.common.messages import UserError
from diffusion_lab.report.records import Run
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.training.tuned import FOLDER

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
