"""A Markdown extension that writes `$...$` and `$$...$$` as MathML, which browsers can draw."""

import re

from latex2mathml.converter import convert
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


class InlineFormula(InlineProcessor):
    """A formula inside a sentence, `$x$`."""

    def handleMatch(self, m, data):
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class DisplayedFormula(BlockProcessor):
    """A formula on lines of its own, between two `$$`."""

    def test(self, parent, block):
        return re.fullmatch(r"\s*\$\$.+\$\$\s*", block, re.DOTALL)

    def run(self, parent, blocks):
        formula = convert(blocks.pop(0).strip().strip("$"), display="block")
        # a wide formula scrolls by itself, the page does not
        blocks.insert(0, self.parser.md.htmlStash.store(f'<div class="formula">{formula}</div>'))
        self.parser.parseBlocks(parent, [blocks.pop(0)])


class Formulas(Extension):
    """Both kinds of formulas."""

    def extendMarkdown(self, md):
        md.inlinePatterns.register(InlineFormula(r"\$([^$\n]+)\$", md), "formula", 185)
        md.parser.blockprocessors.register(DisplayedFormula(md.parser), "formulas", 75)


def makeExtension(**options):
    """Create the extension; Markdown looks for a function of this name."""
    return Formulas(**options)
