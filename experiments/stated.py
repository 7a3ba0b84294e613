"""The numbers of prose, written from records: a comment behind each says where it comes from.

    The U-Net has FID 105<!-- of published fid row=UNet -->, and the DiT is behind by
    23<!-- of published fid row=DiT less=UNet --> (18<!-- ... say=low --> to ...).

A comment names a source relative to its page, a metric, and a row of the source, with less= another
one that it is compared with, whose mean must be lower: where new records turn two rows, their
sentence must be read again. say= is a column of the frames of `diffusion_lab.report.tests`: of one
row mean (the default), half, low, high, min or max; of two gap (the default), low, high, better,
pairs, corrected, p_joint, p_welch or p_paired, or by how many percent the better one is closer to
real images (relative, at least relative_high, at most relative_low). by= is a test in place of the
protocol's. Decimals are kept.

A source is a published folder, several with commas, or runs with *; a CSV file, whose rows are
chosen by row=sweep=steps,steps=10 and paired by seed; or JSON files of runs, whose metric is a path
of keys.
"""

import csv
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from os.path import normpath
from pathlib import Path
from typing import Any

import pandas as pd

from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.quantity import LOWER, REAL, Quantity, quantity_of
from diffusion_lab.report import tests
from diffusion_lab.report.comparison import judge
from diffusion_lab.report.frame import Collection, collect

OPENS = "<!-- of "
MARK = re.compile(rf"(-?\d[\d,]*(?:\.\d+)?){OPENS}(.+?) -->")
OPTIONS = ("row", "less", "say", "by")
TURNED = {"gap": "gap", "low": "high", "high": "low"}
PLAIN = ("p", "corrected", "p_joint", "p_welch", "p_paired", "better", "pairs", "count")


@cache
def collected(folders: Path) -> Collection:
    """The runs of published folders, which several tables share."""
    names = folders.name.split(",")
    found = (sorted(folders.parent.glob(name)) or [folders.parent / name] for name in names)
    return collect([*chain.from_iterable(found)])


def rows_of(path: Path, where: str | None) -> list[dict[str, str]]:
    """The rows of a CSV file that have one of the values of each condition in `where`."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for condition in where.split(",") if where else ():
        name, _, values = condition.partition("=")
        rows = [row for row in rows if row.get(name) in values.split("|")]
    if not rows:
        raise UserError(f"where={where} chooses no row of {path.name}")
    return rows


@cache
def panels_of(folders: Path, metric: str, test: str | None) -> list[tests.Panel]:
    """The panels of a metric of published folders, by a test in place of the protocol's."""
    found = collected(folders)
    if metric not in found.metrics:
        raise UserError(f"{metric} is not in {folders.name}; use {', '.join(found.metrics)}")
    return judge(replace(found, study=found.study | ({"test": test} if test else {})), metric)


def panel_of(source: Path, metric: str, names: Sequence[str], test: str | None) -> tests.Panel:
    """The panel of a metric of rows of a CSV file, or of JSON files."""
    quantity = quantity_of(metric.partition("/")[0]) or Quantity(metric, metric, "", LOWER)
    values, real = [], None
    for name in names:
        if source.suffix == ".csv":
            rows = rows_of(source, name)
            real = float(rows[0][metric + REAL]) if metric + REAL in rows[0] else None
            own = [(row["seed"], float(row[metric])) for row in rows if row.get(metric)]
        else:
            files = source.parents[2].glob("/".join(source.parts[-3:]))
            own = [(path.parts[-3], value_of(path, metric)) for path in files]
        if len(dict(own)) < len(own) or not own:
            raise UserError(f"row={name} has not one {metric} of each seed in {source.name}")
        values += [(name, "", *each) for each in own]
    frame = pd.DataFrame(values, columns=["arm", "data", "seed", "value"])
    return tests.panels(frame, quantity, test or tests.PAIRED, None, real)[0]


def value_of(path: Path, keys: str) -> float:
    """The number of a JSON file at a path of keys, such as neighbours.pixels.copies."""
    record: Any = read_json(path)
    for key in keys.split("."):
        record = record[key]
    return float(record)


def facts_of(source: Path, metric: str, names: list[str], test: str | None) -> tuple:
    """The panel of a metric, and the facts on a row of its source, or on two of them."""
    if source.suffix in (".csv", ".json"):
        panel = panel_of(source, metric, names, test)
    else:
        arms = {arm.name: arm for arm in collected(source).arms}
        if unknown := [each for each in names if each not in arms]:
            raise UserError(f"row={unknown[0]} is not in {source.name}; use {', '.join(arms)}")
        data, names = arms[names[0]].data, [arms[each].line for each in names]
        known = {each.data: each for each in panels_of(source, metric, test)}
        if (panel := known.get(data)) is None:
            raise UserError(f"{metric} of {names[0]} is not in {source.name}")
    if len(names) == 1:
        return panel, panel.means.loc[names[0]]
    for _, pair in panel.tested.iterrows():
        if {pair.ahead, pair.behind} == {*names}:
            row, less = (panel.means["mean"][each] for each in names)
            if row < less:
                raise UserError(f"{' is below '.join(names)}: turn the sentence and its mark")
            return panel, pair
    raise UserError(f"{' and '.join(names)} are not compared in {source.name}")


def stated(page: Path, words: str) -> float:
    """The number that a mark asks for; raises UserError for one that names nothing."""
    name, metric, *given = shlex.split(words)
    options = dict(each.partition("=")[::2] for each in given)
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise UserError(f"{unknown[0]} is not known in this mark; use {', '.join(OPTIONS)}")
    if (by := options.get("by", tests.PAIRED)) not in (tests.JOINT, tests.WELCH, tests.PAIRED):
        raise UserError(f"by={by} is no test; use {tests.JOINT}, {tests.WELCH} or {tests.PAIRED}")
    names = [options[key] for key in ("row", "less") if key in options] or [""]
    source = Path(normpath(page.parent / name))  # pages share what was collected
    if names == ["real images"]:
        panel = panels_of(source, metric, None)[0]
        return math.nan if panel.real is None else panel.real * panel.metric.scale
    panel, facts = facts_of(source, metric, names, options.get("by"))
    say = options.get("say", "mean" if len(names) == 1 else "gap")
    if say not in facts:
        raise UserError(f"say={say} is not known here; use {', '.join(facts.index)}")
    if say.startswith("relative"):
        return -100 * facts[say]
    if say in PLAIN:
        return facts[say]
    if say in TURNED and facts.get("gap", 0) < 0:  # where higher is better
        return -panel.metric.scale * facts[TURNED[say]]
    return panel.metric.scale * facts[say]


def written(page: Path, text: str) -> str:
    """The text of a page with its marked numbers made again."""
    if text.count(OPENS) != len(MARK.findall(text)):
        raise UserError(f"{page}: no number stands in front of a mark {OPENS}... -->")

    def made(mark: re.Match[str]) -> str:
        decimals = len(mark[1].partition(".")[2])
        try:
            if not math.isfinite(found := stated(page, mark[2])):
                raise UserError("it is not known")
            number = f"{found:{',' * (',' in mark[1])}.{decimals}f}"
        except UserError as error:
            raise UserError(f"{page}, number {mark[2]}: {error}") from error
        return f"{number}{OPENS}{mark[2]} -->"

    return MARK.sub(made, text)
