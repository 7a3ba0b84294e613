"""Plots as SVG, drawn once: in fixed colours for a file, in the theme's colours for the page."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# dark enough for white paper; page.css has lighter ones for dark mode, in the same order
COLOURS = ("#0b5fa5", "#b8430a", "#14763a", "#7a2fc0", "#8a5a00", "#b3206b", "#0a6f78", "#51585f")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
STYLE = rc_params_from_file(Path(__file__).with_name("svg.mplstyle"), use_default_template=False)
INK, GRID = STYLE["text.color"], STYLE["grid.color"]


@dataclass(frozen=True)
class Drawing:
    """A plot as SVG for the page and for a file, and in words for readers who cannot see it."""

    name: str
    title: str
    words: str
    inline: str
    file: str


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """The marker of a group, shifted in each round of colours: 64 groups all look different."""
    return list(MARKERS)[(index + index // len(COLOURS)) % len(MARKERS)]


def look_of(index: int) -> dict[str, Any]:
    """The colour and marker of a composition, as keywords of matplotlib."""
    return {"color": colour(index), "marker": marker(index)}


def draw(
    name: str,
    title: str,
    words: str,
    paint: Callable[[Axes], None],
    legend: Mapping[str, int] = MappingProxyType({}),
    size: tuple[float, float] = (4.0, 2.9),
    left: float = 0.62,
) -> Drawing:
    """Draws a plot by `paint`, in `size` (width, height) inches with `left` inches for labels.

    The default size is for plots side by side. `legend` has the index of the colour and marker of
    each name; only the file shows it, because the page has one legend for all plots.
    """
    with rc_context(STYLE):
        figure = Figure(size)
        # margins by hand: a layout that measures every text takes longer than the drawing
        width, height = size
        figure.subplots_adjust(left / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.2 / height)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        inline = themed(_svg(figure), name, title, words)
        add_letters(figure, title, legend)
        return Drawing(name, title, words, inline, _svg(figure))


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(text, metadata=empty)
    return text.getvalue()


def themed(svg: str, name: str, title: str, words: str) -> str:
    """Prepares a plot for the page: the theme's colours, unique ids and a description."""
    for index, fixed in enumerate(COLOURS):
        svg = svg.replace(fixed, f"var(--c{index})")
    root = ElementTree.fromstring(svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)"))
    for element in root.iter():
        for style in element.findall(f"{{{SVG}}}style"):
            element.remove(style)
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif "#" in value:  # a reference inside the plot
                element.set(key, value.replace("#", f"#{name}-"))
    width, height = (float(number) for number in root.get("viewBox", "").split()[2:])
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.set("style", f"max-width:{width * 4 / 3:.0f}px")
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-t {name}-d")
    for place, (tag, text) in enumerate((("title", title), ("desc", words))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag[0]}"})
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def add_letters(figure: Figure, title: str, legend: Mapping[str, int]) -> None:
    """Adds the title above and the legend below a plot, and makes the figure taller for them."""
    width, height = figure.get_size_inches()
    above, below = 20 / 72, (14 * len(legend) + 4 if legend else 0) / 72
    box, whole = figure.subplotpars, above + height + below
    top, bottom = (below + edge * height for edge in (box.top, box.bottom))
    figure.set_size_inches(width, whole)
    figure.subplots_adjust(top=top / whole, bottom=bottom / whole)
    edge = 6 / 72 / width
    figure.suptitle(title, x=edge, y=1 - 6 / 72 / whole, ha="left", va="top", fontsize=11)
    if legend:
        marks = [
            Line2D([], [], linestyle="", label=name, **look_of(look))
            for name, look in legend.items()
        ]
        figure.legend(handles=marks, loc="lower left", frameon=False, borderpad=0, handlelength=1)
