"""The tables of the page: compositions, pairs, settings, runs; sorted and filtered by page.js."""

import os
from collections.abc import Mapping, Sequence
from html import escape

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.fairness import machine
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.markup import details, glyph, listed, section, table
from diffusion_lab.analysis.comparison.pairs import Pair
from diffusion_lab.analysis.comparison.table import NONE, Cell, columns_of, notes, rows
from diffusion_lab.analysis.comparison.verdict import SHOWN
from diffusion_lab.metrics import Quantity
from diffusion_lab.runs.settings import CLASS


def _head(name: str, title: str, unit: str = "", first: bool = False) -> str:
    hint = f' title="{escape(unit)}"' if unit else ""
    kind = ' class="name"' if first else ' class="number"'
    return (
        f'<th scope="col" data-kind="{name}"{kind} aria-sort="none">'
        f'<button type="button"{hint}>{escape(title)}<span class="arrow" aria-hidden="true"></span>'
        "</button></th>"
    )


def _cell(name: str, cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    spread = escape(f" ± {cell.spread}{cell.mark}") if cell.spread else ""
    return (
        f'<td class="number" data-kind="{name}"{value}>'
        f'{escape(cell.main)}<span class="pm">{spread}</span></td>'
    )


def compositions(groups: Sequence[Group]) -> str:
    """A row a composition, and one of real images."""
    columns, cells, real = rows(groups)
    head = _head("name", "Composition", first=True) + _head("seeds", "Seeds")
    head += "".join(_head(column.kind, column.title, column.unit) for column in columns)
    body = ""
    for group, row in zip(groups, cells, strict=True):
        count = len(group.members)
        line = f'<th scope="row">{glyph(group.look)}{escape(group.name)}</th>'
        line += f'<td class="number" data-kind="seeds" data-value="{count}">{count}</td>'
        line += "".join(_cell(column.kind, each) for column, each in zip(columns, row, strict=True))
        body += f"<tr>{line}</tr>"
    floor = "".join(_cell(column.kind, each) for column, each in zip(columns, real, strict=True))
    foot = f'<tr><th scope="row">real images</th><td></td>{floor}</tr>'
    meanings = "".join(
        f"<dt>{escape(column.title)}</dt><dd>{escape(column.unit)}</dd>"
        for column in columns
        if column.unit
    )
    content = table(
        "compositions", "Means over seeds; a heading sorts", head, body, "sortable filtered", foot
    )
    content += listed(notes(groups, cells), "muted")
    content += details("What the columns are", f"<dl>{meanings}</dl>")
    files = (
        'Also as <a href="table.md">Markdown</a>, <a href="table.csv">CSV</a> and '
        '<a href="table.tex">LaTeX</a>, beside this file; <a href="pairs.csv">pairs.csv</a> has '
        "every test."
    )
    return section("table", "Table", content, files)


def pairs(metric: Quantity, found: Sequence[Pair]) -> str:
    """A row a pair of compositions of the same data."""
    sizes = any(pair.size for pair in found)
    titles = ["Data"] * sizes + ["Ahead", "Behind", "Gap", "To exceed", "p", "Holm", "Told apart"]
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    body = ""
    for pair in found[:SHOWN]:
        ahead, behind = (
            f"{glyph(group.look)}{escape(group.name)}" for group in (pair.ahead, pair.behind)
        )
        width = f'<span class="pm"> ± {metric.gap(pair.half_width)}</span>'
        numbers = [metric.gap(abs(pair.gap)) + width]
        if pair.tested:
            numbers.append(metric.gap(pair.detectable))
            numbers += [f"{p:.2g}" for p in (pair.tested.p, pair.tested.corrected)]
            answer = "yes" if pair.told_apart else "no"
        else:
            numbers += [NONE] * 3
            answer = "not tested"
        cells = "".join(f'<td class="number">{value}</td>' for value in numbers)
        size = f"<td>{escape(pair.size)}</td>" * sizes
        body += f'<tr>{size}<th scope="row">{ahead}</th><td>{behind}</td>{cells}'
        body += f"<td>{answer}</td></tr>"
    caption = (
        f"Pairs by {metric.title}: mean gap over common seeds with its 95 % confidence interval, "
        "of the pair alone and uncorrected, what a gap of this spread must exceed to be told from "
        "chance, and p of the paired t-test, alone and with Holm's correction"
    )
    summary = f"{len(found)} pairs" if len(found) > 1 else "The test"
    if len(found) > SHOWN:
        summary += f", of which {SHOWN} are here and all in pairs.csv"
    return details(summary, table(f"pairs-{metric.name}", caption, head, body, "small"))


def settings(groups: Sequence[Group]) -> str:
    """A row a setting that is not the same in all compositions."""
    keys = list(groups[0].settings)
    if not keys:
        return ""
    head = '<th scope="col">Setting</th>' + "".join(
        f'<th scope="col">{glyph(group.look)}{escape(group.name)}</th>' for group in groups
    )
    body = ""
    for key in keys:
        values = "".join(f"<td>{escape(_value(group.settings, key))}</td>" for group in groups)
        body += f'<tr><th scope="row"><code>{escape(key)}</code></th>{values}</tr>'
    caption = (
        "Every setting whose value is not the same in all compositions; seeds and places aside"
    )
    content = details(
        f"{len(keys)} settings differ", table("settings", caption, head, body, "small")
    )
    return section("settings", "What differs", content)


def _value(chosen: Mapping[str, object], key: str) -> str:
    value = chosen.get(key)
    if value is None:
        return NONE
    return str(value).rpartition(".")[2] if key.endswith(CLASS) else str(value)


def runs(groups: Sequence[Group]) -> str:
    """A row a run."""
    members = [(group, member) for group in groups for member in group.members]
    base = os.path.commonpath([os.path.abspath(m.run.folder.parent) for _, m in members])
    columns = columns_of(groups)
    head = _head("name", "Run", first=True) + _head("seed", "Seed")
    head += "".join(_head(column.kind, column.title, column.unit) for column in columns)
    body = ""
    for group, member in members:
        place = escape(os.path.relpath(member.run.folder, base))
        line = f'<th scope="row">{glyph(group.look)}{escape(group.name)}'
        line += f'<span class="path">{place}</span></th>'
        line += f'<td class="number" data-value="{member.run.seed}">{member.run.seed}</td>'
        for column in columns:
            value = member.figures.get(column.kind)
            said = NONE if value is None else column.say(column.scale * value)
            line += _cell(column.kind, Cell(value, said))
        body += f"<tr>{line}</tr>"
    caption = f"Every run by itself; folders are in {os.path.relpath(base)}"
    content = table("runs", caption, head, body, "sortable filtered small")
    content += details("Where they ran", listed(machines([member.run for _, member in members])))
    return section("runs", "Runs", content)


def machines(trained: Sequence[Run]) -> list[str]:
    """Devices, versions and commits, each once."""
    counts: dict[str, int] = {}
    for run in trained:
        known = run.summary
        versions = known.get("versions", {})
        text = (
            f"{machine(run)}, {known.get('precision', '?')}, torch {versions.get('torch', '?')}, "
            f"commit {(known.get('git_commit') or 'unknown')[:9]}"
        )
        counts[text] = counts.get(text, 0) + 1
    return [f"{count} run{'s' if count > 1 else ''}: {text}" for text, count in counts.items()]
