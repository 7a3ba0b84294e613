"""Run the tutorial, docs/tutorial.ipynb, in this folder, and keep its outputs in it."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tutorial import NOTEBOOK, ROOT

DATA = "DIFFUSION_LAB_DATA"  # the folder of the images, by default that of the repository


def run(folder: Path) -> nbformat.NotebookNode:
    """Run the notebook in a folder, where its runs go; the notebook with its outputs."""
    os.environ.setdefault(DATA, str(ROOT / "data"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, resources=resources, timeout=None, record_timing=False, coalesce_streams=True
    )
    return client.execute()


if __name__ == "__main__":
    nbformat.write(run(NOTEBOOK.parent), NOTEBOOK)
