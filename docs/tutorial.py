"""Write the tutorial's page, docs/pages/tutorial/, from the notebook and the outputs kept in it."""

import base64
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs/tutorial.ipynb"
PAGES = ROOT / "docs/pages/tutorial"


def text_of(value: str | list[str]) -> str:
    """A text of a notebook, which may be kept as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def block(text: str, language: str) -> str:
    """A block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def output_of(output: dict, picture: Path) -> str:
    """The Markdown of a cell's output; if it is a picture, it is written to the file `picture`."""
    if output["output_type"] == "stream":
        return block(text_of(output["text"]), "text")
    kinds = output["data"]
    if "image/png" in kinds:
        picture.write_bytes(base64.b64decode(text_of(kinds["image/png"])))
        return f"![What the code above draws]({picture.name})"
    if "text/markdown" in kinds:
        return text_of(kinds["text/markdown"]).strip()
    return block(text_of(kinds["text/plain"]), "text")


def page_of(notebook: dict, folder: Path) -> str:
    """The Markdown of a notebook that lies in docs/; its pictures are written to `folder`."""
    parts = []
    for place, cell in enumerate(notebook["cells"]):
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](pages/", "](../"))
            continue
        parts.append(block(source, "python"))
        for number, output in enumerate(cell["outputs"]):
            parts.append(output_of(output, folder / f"{place}-{number}.png"))
    return "\n\n".join([*parts, ""])


def main() -> None:
    """Write the page anew, with the notebook itself beside it."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    shutil.copy(NOTEBOOK, PAGES)
    page = page_of(json.loads(NOTEBOOK.read_text()), PAGES)
    title, _, rest = page.partition("\n")
    note = f"This page is [a notebook]({NOTEBOOK.name}), as it was run."
    (PAGES / "tutorial.md").write_text(f"{title}\n\n{note}\n{rest}")


if __name__ == "__main__":
    main()
