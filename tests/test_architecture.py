"""Imports go one way through the rooms, and the theory needs torch alone."""

import ast
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "diffusion_lab"
ROOMS = [  # each may import those above it
    "common",
    "compute",
    "diffusion",
    "backbone",
    "data",
    "metrics",
    "first_stage",
    "pipeline",
    "build",
    "runs",
    "profiling",
    "training",
    "analysis",
    "cli",
]
ALONE = {"diffusion": {"common", "diffusion"}, "backbone": {"common", "backbone"}}
ENTRY = ("__init__", "__main__")


def files(room: str) -> list[Path]:
    path = PACKAGE / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("diffusion_lab.")}


def test_every_file_is_in_a_room_and_the_house_is_small():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    entries -= {*ENTRY, "__pycache__", "conf"}
    assert entries == set(ROOMS)
    assert len(entries) <= 15


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    allowed = ALONE.get(room, set(ROOMS[: ROOMS.index(room) + 1]))
    for path in files(room):
        assert rooms_imported(path) <= allowed, path


@pytest.mark.parametrize("path", files("diffusion"), ids=lambda path: path.stem)
def test_theory_imports_torch_and_the_standard_library_alone(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots <= {"torch", "diffusion_lab"} | sys.stdlib_module_names


def test_no_import_is_hidden_from_the_running_program():
    for path in PACKAGE.rglob("*.py"):
        assert "TYPE_CHECKING" not in path.read_text(), path
