"""The command `compare`: from run folders to a folder with a page, tables and figures."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from diffusion_lab.common.files import require_own, write_atomically
from diffusion_lab.common.formats import literal
from diffusion_lab.common.messages import say
from diffusion_lab.metrics.quantity import VALIDATION_LOSS
from diffusion_lab.report import page
from diffusion_lab.report.comparison import Report
from diffusion_lab.report.facts import setting
from diffusion_lab.report.frame import collect
from diffusion_lab.report.scaling import scaling_csv
from diffusion_lab.report.tables import pairs_csv, samplings_csv
from diffusion_lab.report.words import ended

PLOTS = "plots"


def compare(paths: Sequence[str], output: str) -> dict[str, object]:
    """Compares the run folders at or below `paths`; writes the folder `output`.

    Raises UserError, before anything is written, if there is no run, if the runs were measured in
    different ways, or if `output` contains other files.
    """
    folder = Path(output)
    require_own(folder, page.is_ours)
    found = collect(paths)
    report = Report(found)
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
    """Writes every file, and deletes the figures of an earlier comparison.

    The page is the first, as it marks the folder as one that a later comparison may replace.
    """
    text = page.render(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", text)
    (folder / PLOTS).mkdir(exist_ok=True)
    drawings = [*report.figures, *report.laws, *chain(*report.folded.values())]
    kinds = ("tuning", *report.found.metrics, VALIDATION_LOSS.name)
    names = [f"{drawing.name}.svg" for drawing in drawings]
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
        "scaling.csv": scaling_csv(report.scaling) if report.scaling else None,
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
