"""Reads an offline W&B run back from its file by W&B's own reader."""

import base64
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PICTURE, TABLE, PAGE = "image-file", "table-file", "html-file"


@dataclass(frozen=True)
class Record:
    """A run's configuration, its rows by step (numbers, pictures and tables), and what it kept."""

    folder: Path
    run: dict
    axes: dict[str, str | None]  # x-axis of each defined name; "*" is any other
    rows: dict[int, dict[str, object]]
    summary: dict[str, object]
    artifacts: dict[str, dict[str, Path]]  # their files by name, where they wait for the upload

    @property
    def config(self) -> dict:
        return self.run["config"]["update"]

    @property
    def scalars(self) -> dict[int, dict[str, float]]:
        return {
            step: {name: value for name, value in row.items() if not isinstance(value, dict)}
            for step, row in self.rows.items()
        }

    def media(self, name: str, kind: str) -> dict[int, dict]:
        """The facts of a picture or table by step; asserts that its file exists."""
        found = {step: row[name] for step, row in self.rows.items() if name in row}
        for facts in found.values():
            assert facts["_type"] == kind
            assert (self.folder / "files" / facts["path"]).is_file()
        return found


def read(folder: Path) -> Record:
    """Reads the only offline run in wandb/ of a run folder, or in an offline run's own folder."""
    (folder,) = [folder] if list(folder.glob("*.wandb")) else folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in log.splitlines()]
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    axes, rows = {}, {}
    for record in records:
        if record["type"] == "metric":
            metric = record["metric"]
            axes[metric.get("name") or metric["glob_name"]] = metric.get("step_metric")
        if record["type"] == "history":
            step = record["history"]["step"]["num"]
            assert step not in rows
            rows[step] = nested(record["history"]["item"])
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    summaries = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    return Record(
        folder,
        run,
        axes,
        rows,
        {name: value for summary in summaries for name, value in summary.items()},
        {each["name"]: staged(each) for each in artifacts},
    )


def staged(artifact: dict) -> dict[str, Path]:
    """The files of an artifact by their names in it; asserts that they have its checksums."""
    found = {}
    for entry in artifact["manifest"]["contents"]:
        found[entry["path"]] = path = Path(entry["local_path"])
        digest = hashlib.md5(path.read_bytes()).digest()
        assert base64.b64encode(digest).decode() == entry["digest"]
    return found


def nested(item: dict[str, object]) -> dict[str, object]:
    """The values of a row without W&B's own; those of pictures and tables in dictionaries."""
    media = {key.removesuffix("._type") for key in item if key.endswith("._type")}
    row = {}
    for key, value in item.items():
        name = next((name for name in media if key.startswith(f"{name}.")), None)
        if name is not None:
            row.setdefault(name, {})[key.removeprefix(f"{name}.")] = value
        elif not key.startswith("_"):
            row[key] = value
    return row
