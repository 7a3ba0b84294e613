"""The folder that a comparison writes: tables, plots, and the page."""

from pathlib import Path

from diffusion_lab.analysis.comparison import measurements, page, pairs
from diffusion_lab.analysis.comparison.groups import runs_of
from diffusion_lab.analysis.comparison.page import Report
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import literal
from diffusion_lab.metrics.quantities import VALIDATION_LOSS

PLOTS = "plots"
SAMPLINGS, SCALING = "samplings.csv", "scaling.csv"


def write(folder: Path, report: Report) -> None:
    """Writes every file, and deletes the plots of an earlier comparison.

    The page is the first, as it marks the folder as one that a later comparison may replace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", page.render(report))
    (folder / PLOTS).mkdir(exist_ok=True)
    table = report.table
    answer = literal(report.judged[0].verdict.answer)
    text = f"{literal(report.setting)}\n\n{table.markdown()}\n{answer}.\n"
    said = [*report.sentences, *report.notes, *report.left_out]
    if sampled := report.samplings:
        text += f"\n{sampled.markdown()}"
    text += "".join(f"\n* {literal(sentence).rstrip('.')}." for sentence in said) + "\n"
    tests = [pair for each in report.judged for pair in each.verdict.pairs]
    drawn = [*report.tuning, *(plot for each in report.judged for plot in each.drawings)]
    if report.scaling:
        drawn += report.scaling.drawings
    tables = {
        SAMPLINGS: sampled.csv() if sampled else None,
        SCALING: report.scaling.csv() if report.scaling else None,
    }
    plots = {f"{plot.name}.svg": plot.file for plot in drawn}
    judged = measurements.judged_by(runs_of(report.groups))
    kinds = ("tuning", *(metric.name for metric in (*judged, VALIDATION_LOSS)))
    for old in (folder / PLOTS).glob("*.svg"):
        if old.name not in plots and old.name.startswith(kinds):
            old.unlink()
    files = {
        "table.md": text,
        "table.csv": table.csv(),
        "table.tex": table.latex(),
        "runs.csv": table.runs_csv(),
        "pairs.csv": pairs.as_csv(tests),
        **tables,
        **{f"{PLOTS}/{name}": plot for name, plot in plots.items()},
    }
    for name, content in files.items():
        if content is None:  # not in this comparison, but maybe in an earlier one
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomically(folder / name, content)
