"""Plots as SVG: drawn once, in fixed colours for a file and in those of the page's theme."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# dark enough for white paper; the page has lighter ones for its dark theme, by the same numbers
COLOURS = (
    "#0b5fa5",
    "#b8430a",
    "#14763a",
    "#7a2fc0",
    "#8a5a00",
    "#b3206b",
    "#0a6f78",
    "#51585f",
)
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
INK, GRID = "#1b1f24", "#d4d9df"
STYLE = {
    "svg.fonttype": "none",  # text stays text, to be searched and set in one's own font
    "svg.hashsalt": "diffusion_lab",  # the same drawing is the same file
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Drawing:
    """A plot: for the page, for a file, and in words for who cannot see it."""

    name: str
    title: str
    words: str
    inline: str
    file: str


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Another one in each round of colours, too, so that no two groups of 64 look alike."""
    return list(MARKERS)[(index + index // len(COLOURS)) % len(MARKERS)]


def draw(
    name: str,
    title: str,
    words: str,
    size: tuple[float, float],
    left: float,
    paint: Callable[[Axes], None],
    legend: Sequence[tuple[str, int]] = (),
) -> Drawing:
    """A plot of (width, height) inches that `paint` fills, with `left` inches for what is beside.

    `legend`, names and places of groups, is for the file: the page has one for all plots.
    """
    with rc_context(STYLE):
        figure = Figure(size)
        # by hand: a layout that measures every text takes longer than the drawing
        width, height = size
        figure.subplots_adjust(left / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.2 / height)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return Drawing(
        name, title, words, themed(svg, name, title, words), lettered(svg, title, legend)
    )


def themed(svg: str, name: str, title: str, words: str) -> str:
    """A plot as a part of the page: in its colours, with names of its own, and described."""
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    for index, fixed in enumerate(COLOURS):
        svg = svg.replace(fixed, f"var(--c{index})")
    width, height = _size(svg)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width * 4 / 3:.0f}px" role="img" '
        f'aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(words)}</desc>'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: head, svg, count=1)


def lettered(svg: str, title: str, legend: Sequence[tuple[str, int]]) -> str:
    """A plot as a file of its own, with its title above and its legend below."""
    width, height = _size(svg)
    above, line = 20, 13  # points
    whole = above + height + line * len(legend)
    head = (
        '<?xml version="1.0" encoding="utf-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" version="1.1" '
        f'width="{width:g}pt" height="{whole:g}pt" viewBox="0 {-above} {width:g} {whole:g}" '
        f'font-family="sans-serif" font-size="9">'
        f'<text x="6" y="-7" font-size="11" fill="{INK}">{escape(title)}</text>'
    )
    for place, (name, index) in enumerate(legend):
        head += (
            f'<text x="6" y="{height + 9 + line * place:g}" fill="{colour(index)}">'
            f'{MARKERS[marker(index)]}<tspan fill="{INK}"> {escape(name)}</tspan></text>'
        )
    return re.sub(r"^<svg[^>]*>", lambda _: head, svg, count=1)


def _size(svg: str) -> tuple[float, float]:
    """Width and height in points."""
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    return float(view[1]), float(view[2])
