"""A Markdown extension: links of a page to the repository become links to pages of the site.

On GitHub, which shows the pages too, `../../conf/sampler` is a folder; the site has a page of its
options. So it is with commands, the package, the notebook, and the pages of `experiments/`.
"""

import re

from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

SITE = {
    r"\.\./\.\./experiments/": "experiments/",
    r"\.\./\.\./conf\)": "options/index.md)",
    r"\.\./\.\./conf/\w+\.yaml\)": "options/commands.md)",
    r"\.\./\.\./conf/(\w+)\)": r"options/\1.md)",
    r"\.\./\.\./diffusion_lab\)": "api/index.md)",
    r"\.\./\.\./diffusion_lab/(\w+)\)": r"api/\1.md)",
    r"\.\./\.\./diffusion_lab/runs/": "diffusion_lab/runs/",
    r"\.\./\.\./diffusion_lab/(\w+)/[\w/]+\.py\)": r"api/\1.md)",
    r"\.\./tutorial\.ipynb\)": "tutorial/tutorial.md)",
}
NESTED = re.compile(r"\]\(\.\./\.\./conf/(\w+)/([\w/]+)\)")  # a group inside of a group


class SourceLinks(Preprocessor):
    """Replaces the targets of links."""

    def run(self, lines):
        return [of_site(line) for line in lines]


def of_site(line: str) -> str:
    """A line of a page with links to pages of the site."""
    for source, page in SITE.items():
        line = re.sub(rf"\]\({source}", f"]({page}", line)
    return NESTED.sub(
        lambda link: f"](options/{link[1]}.md#{link[1]}-{link[2].replace('/', '-')}-options)", line
    )


class SourceLinksExtension(Extension):
    """Runs the preprocessor before all others."""

    def extendMarkdown(self, md):
        md.preprocessors.register(SourceLinks(md), "source_links", 200)


def makeExtension(**options):
    """Create the extension; Markdown looks for a function of this name."""
    return SourceLinksExtension(**options)
