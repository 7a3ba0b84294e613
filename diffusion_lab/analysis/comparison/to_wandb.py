"""A comparison as a W&B run: its verdict, tables and page."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import wandb

from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Range
from diffusion_lab.runs.folder import load_config
from diffusion_lab.training.logger.reachability import why_offline
from diffusion_lab.training.logger.run_logger import first_line
from diffusion_lab.training.logger.wandb_logger import artifact_of, offline, opened, staged_in

PROJECT = Range(
    "the name of a W&B project",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[^/\\#?%:]+", value)),
    "diffusion-lab",
)
TABLES = {"compositions": "table.csv", "runs": "runs.csv", "pairs": "pairs.csv"}
VERDICT, COMPARISON = "verdict", "comparison"  # start the names of answers, and of tables and page


def log_comparison(folder: Path, project: str, result: dict[str, Any]) -> None:
    """Logs a written comparison to a W&B project, offline without a key or a network.

    `result` is what `compare` returns. Raises UserError if W&B fails.
    """
    runs = [run for each in result["compositions"].values() for run in each]
    place = {"project": project, "group": common_group(runs), "job_type": "compare"}
    config = {"compositions": result["compositions"]}
    try:
        run, reason = opened(why_offline("auto"), folder, name=folder.name, config=config, **place)
        with staged_in(folder / "wandb"):
            shown: dict[str, Any] = {name: table(folder / file) for name, file in TABLES.items()}
            shown["page"] = wandb.Html((folder / "index.html").read_text(), inject=False)
            run.log({f"{COMPARISON}/{name}": each for name, each in shown.items()})
            name = f"{COMPARISON}-{run.id}"
            run.log_artifact(artifact_of(name, COMPARISON, folder, files_of(folder)))
        answers = {f"{VERDICT}/{metric}": said for metric, said in result["verdict"].items()}
        run.summary.update(answers)
        line = offline(reason, folder) if reason else f"W&B: {run.url}"
        run.finish()
    except Exception as error:  # of a key, a server, or a disk: each has its own class
        said = first_line(error)
        raise UserError(f"the comparison is in {folder}, but W&B failed: {said}") from error
    say(line)


def common_group(runs: Iterable[str]) -> str | None:
    """The W&B group of the runs that have one, if it is the same for all of them."""
    loggers = [load_config(run).get("logger") or {} for run in runs]
    groups = {(each.get("wandb") or {}).get("group") for each in loggers} - {None}
    return groups.pop() if len(groups) == 1 else None


def table(path: Path) -> wandb.Table:
    """The table in a CSV file, with its numbers as numbers."""
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return wandb.Table(columns=[*head], data=[[value_of(cell) for cell in row] for row in rows])


def value_of(cell: str) -> float | str | None:
    """A cell as a number, if it is one; None if it is empty."""
    try:
        return float(cell)
    except ValueError:
        return cell or None


def files_of(folder: Path) -> list[Path]:
    """The files of a comparison, without those of its W&B runs."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if path.relative_to(folder).parts[0] != "wandb"]
