"""The command `compare`, which may also log its comparison as a W&B run."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Range, optional
from diffusion_lab.report.page import compare
from diffusion_lab.runs.files import load_record

PROJECT = Range(
    "the name of a W&B project",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[^/\\#?%:]+", value)),
    "diffusion-lab",
)
TABLES = {"compositions": "table.csv", "runs": "runs.csv", "pairs": "pairs.csv"}
VERDICT, COMPARISON = "verdict", "comparison"  # start the names of answers, and of tables and page


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


def log_comparison(folder: Path, project: str, result: dict[str, Any]) -> None:
    """Logs what `compare` wrote and returned to a W&B project; raises UserError if W&B fails."""
    # imported late, since reading records needs neither W&B nor torch
    import wandb

    from diffusion_lab.training.logger.run_logger import first_line, why_offline
    from diffusion_lab.training.logger.wandb_logger import artifact_of, offline, opened, staged_in

    runs = [run for each in result["compositions"].values() for run in each]
    place = {"project": project, "group": common_group(runs), "job_type": "compare"}
    config = {"compositions": result["compositions"]}
    try:
        run, reason = opened(why_offline("auto"), folder, name=folder.name, config=config, **place)
        with staged_in(folder / "wandb"):
            tables = {name: table(folder / file) for name, file in TABLES.items()}
            shown: dict[str, Any] = {n: wandb.Table([*h], rows) for n, (h, rows) in tables.items()}
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
    loggers = [load_record(run).get("logger") or {} for run in runs]
    groups = {(each.get("wandb") or {}).get("group") for each in loggers} - {None}
    return groups.pop() if len(groups) == 1 else None


def table(path: Path) -> tuple[list[str], list[list[float | str | None]]]:
    """The columns and rows of a CSV file, with its numbers as numbers."""
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, [[value_of(cell) for cell in row] for row in rows]


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
