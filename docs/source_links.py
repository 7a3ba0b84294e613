"""A Markdown extension for links to `experiments/`, which the site has beside its pages.

In the repository, where GitHub shows the pages too, that folder is two levels above them.
"""

from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor


class SourceLinks(Preprocessor):
    """Shortens `](../../experiments/...)` to `](experiments/...)`."""

    def run(self, lines):
        return [line.replace("](../../experiments/", "](experiments/") for line in lines]


class SourceLinksExtension(Extension):
    """Runs the preprocessor before all others."""

    def extendMarkdown(self, md):
        md.preprocessors.register(SourceLinks(md), "source_links", 200)


def makeExtension(**options):
    """Create the extension; Markdown looks for a function of this name."""
    return SourceLinksExtension(**options)
