"""Docstrings are whole sentences: none opens with a word that needs the code below it."""

import ast
from pathlib import Path

import pytest
from helpers.paths import ROOT

NEEDS_MORE = {"Of", "Those", "That", "As", "What", "Whose", "Which"}
FOLDERS = ("diffusion_lab", "docs", "experiments", "tests")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, DOCUMENTED)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_stand_alone(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for text in docstrings(path):
            assert text.split(" ")[0].strip(",") not in NEEDS_MORE, f"{path}: {text}"
