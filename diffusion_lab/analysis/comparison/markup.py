"""The pieces of HTML that the page and its tables are made of."""

from collections.abc import Iterable
from html import escape

from diffusion_lab.analysis.comparison.svg import COLOURS, MARKERS, marker


def glyph(index: int) -> str:
    """The mark of a group in plots, as a letter in its colour."""
    shape, place = MARKERS[marker(index)], index % len(COLOURS)
    return f'<span class="glyph" style="color:var(--c{place})" aria-hidden="true">{shape}</span> '


def section(name: str, title: str, content: str, intro: str = "") -> str:
    """A part of the page under a heading; `content` and `intro` are HTML."""
    intro = f'<p class="intro">{intro}</p>' if intro else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(title)}</h2>{intro}{content}</section>'
    )


def listed(sentences: Iterable[str], kind: str = "") -> str:
    """Sentences as a list, each with its full stop."""
    items = "".join(f"<li>{escape(sentence.rstrip('.'))}.</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def details(summary: str, content: str) -> str:
    """HTML that is folded away at first."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def scrolled(caption: str, content: str) -> str:
    """HTML that is scrolled sideways where it is wide; `caption` is the id of what names it."""
    region = f'<div class="scroll" role="region" aria-labelledby="{caption}" tabindex="0">'
    return f"{region}{content}</div>"


def table(name: str, caption: str, head: str, body: str, kinds: str, foot: str = "") -> str:
    """A table with a caption; `head` are cells, `body` and `foot` rows."""
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    return scrolled(
        f"{name}-caption",
        f'<table class="{kinds}"><caption id="{name}-caption">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table>",
    )
