"""Imports go one way, and the theory needs torch alone."""

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from helpers.paths import CONF, ROOT

PACKAGE = ROOT / "diffusion_lab"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [  # each may import those above it
    "common",
    "compute",
    "diffusion",
    "backbone",
    "data",
    "metrics",
    "first_stage",
    "assembly",
    "runs",
    "training",
    "families",
    "estimate",
    "report",
    "analysis",
    "cli",
]
ALONE = {"diffusion": {"common", "diffusion"}, "backbone": {"common", "backbone"}}
ENTRY = ("__init__", "__main__")


def files(room: str) -> list[Path]:
    path = PACKAGE / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text()))]


@cache
def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("diffusion_lab.")}


def test_every_file_is_in_a_room():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    entries -= {*ENTRY, "__pycache__", "conf"}
    assert entries == set(ROOMS)


def test_imports_go_one_way():
    for place, room in enumerate(ROOMS, 1):
        allowed = ALONE.get(room, set(ROOMS[:place]))
        for path in files(room):
            assert rooms_imported(path) <= allowed, path


def test_theory_imports_torch_and_the_standard_library_alone():
    for path in files("diffusion"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= {"torch", "diffusion_lab"} | sys.stdlib_module_names, path


def test_common_knows_neither_the_configuration_nor_ranks():
    for path in files("common"):
        names = imports(path)
        assert not {name.split(".")[0] for name in names} & {"hydra", "omegaconf"}, path
        assert not {name for name in names if name.startswith("torch.distributed")}, path


def test_the_stations_of_a_step_are_files():
    """The opening docstring of the module lists a few files, and they exist."""
    said = ast.get_docstring(nodes(PACKAGE / "families/diffusion/module.py")[0])
    listed = re.findall(r"^ +(\w+/[\w/]+[.]py)", said, re.MULTILINE)
    assert 0 < len(set(listed)) <= 8
    for name in re.findall(r"[\w/]+[.]py", said):
        assert (PACKAGE / name).exists() or (PACKAGE / "training" / name).exists(), name


def test_no_imports_go_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    known = {name.removesuffix(".__init__"): path for name, path in names.items()}
    before = {}
    for module, path in known.items():
        before[module] = set()
        for name in imports(path):
            while name and name not in known:
                name = name.rpartition(".")[0]
            before[module] |= {name} - {"", module}
    assert list(TopologicalSorter(before).static_order())  # raises CycleError


def test_a_name_of_a_class_is_there_once():
    names = [n.name for path in FILES for n in nodes(path) if isinstance(n, ast.ClassDef)]
    assert not {name for name in names if names.count(name) > 1}


def test_the_core_names_no_keys_of_the_configuration():
    """Classes of the core name parameters in their errors; `assembly` prefixes the full key."""
    groups = "|".join(path.name for path in CONF.iterdir() if path.is_dir())
    key = re.compile(rf"\b({groups})(/\w+)?([.]\w+)*=\S|\b({groups})[.]\w+=?$")
    for path in [*files("diffusion"), *files("backbone")]:
        for node in nodes(path):
            if isinstance(node, ast.Raise):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        assert not key.search(part.value), f"{path}: {part.value}"


def test_nothing_needs_modules_that_windows_lacks_and_no_import_is_hidden_from_the_program():
    absent = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"}
    for path in FILES:
        assert not absent & {name.split(".")[0] for name in imports(path)}, path
        assert "TYPE_CHECKING" not in path.read_text(), path


def test_no_name_hides_a_module_of_its_package():
    """`import a.b` would mean the module b, and `from a import b` the name b."""
    for path in PACKAGE.rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        modules = {each.stem for each in path.parent.iterdir()}
        names = {
            name.rpartition(".")[2] for name in imports(path) - {f"{package}.{m}" for m in modules}
        }
        assert names & modules == set(), path
