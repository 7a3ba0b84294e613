"""Dependencies point one way, and the theory needs torch alone."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffusion_lab"
THEORY = ["noise.py", "guidance.py", "schedule", "objective", "sampler"]


def files(name: str) -> list[Path]:
    path = PACKAGE / name
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules that a file imports at run time: `if TYPE_CHECKING:` blocks are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level or None]
            base = ".".join(parents) + "." if node.level else ""
            names.add(base + (node.module or ""))
    return names


@pytest.mark.parametrize("path", [p for name in THEORY for p in files(name)], ids=str)
def test_theory_imports_torch_and_the_standard_library_alone(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots <= {"torch", "diffusion_lab"} | sys.stdlib_module_names


@pytest.mark.parametrize(
    ("layer", "forbidden"),
    [
        ("noise.py", ["schedule", "objective", "sampler", "backbone", "denoiser", "guidance"]),
        ("schedule", ["objective", "sampler", "backbone", "denoiser", "guidance"]),
        ("objective", ["sampler", "backbone", "guidance", "callbacks"]),
        ("sampler", ["objective", "backbone", "denoiser", "guidance"]),
        ("backbone", ["noise", "schedule", "objective", "sampler", "denoiser", "guidance"]),
        ("denoiser.py", ["sampler", "guidance", "callbacks"]),
        ("data", ["schedule", "objective", "sampler", "backbone", "denoiser", "metrics"]),
        ("metrics", ["schedule", "objective", "sampler", "backbone", "denoiser", "pipeline"]),
    ],
)
def test_dependencies_point_one_way(layer, forbidden):
    for path in files(layer):
        for name in imports(path):
            for other in forbidden:
                full = f"diffusion_lab.{other}"
                assert not f"{name}.".startswith(f"{full}."), f"{path} imports {name}"
