"""Write the API pages, docs/pages/api/, which mkdocstrings fills from the docstrings."""

import ast
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion_lab"
PAGES = ROOT / "docs/pages/api"
FIRST = ("diffusion", "backbone", "assembly", "data", "metrics", "first_stage")  # on the index
ROOMS = sorted(
    (path.parent.name for path in PACKAGE.glob("*/__init__.py")),
    key=lambda room: (FIRST.index(room) if room in FIRST else len(FIRST), room),
)


def docstring_of(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]


def modules_of(room: str) -> list[str]:
    """The modules of a room that define something, packages first."""
    names = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        defines = (ast.ClassDef, ast.FunctionDef)
        if any(isinstance(node, defines) for node in ast.parse(path.read_text()).body):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def public_names() -> dict[str, str]:
    """The names that `diffusion_lab` itself offers, and the module that defines each."""
    homes = homes_of(PACKAGE / "__init__.py")
    return {name: defining(home, name) for name, home in homes.items()}


def homes_of(package: Path) -> dict[str, str]:
    """The names that a package imports on first use, and the modules that define them."""
    for node in ast.parse(package.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "HOMES":
            return ast.literal_eval(node.value)
    return {}


def defining(module: str, name: str) -> str:
    """The module that defines a name which `module` imports or defines."""
    package = ROOT / module.replace(".", "/") / "__init__.py"
    if package.exists():
        if home := homes_of(package).get(name):
            return f"{module}.{home}"
        for node in ast.parse(package.read_text()).body:
            if isinstance(node, ast.ImportFrom) and name in (a.name for a in node.names):
                return defining(node.module, name)
    return module


def documented(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """The public classes and functions of a module that have a docstring."""
    path = ROOT / module.replace(".", "/")
    package = path / "__init__.py"
    file = package if package.exists() else path.with_suffix(".py")
    return {
        node.name: node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node)
    }


def rows(names: dict[str, str]) -> list[str]:
    """A table of names by the modules that define them: what each is, by its docstring."""
    lines = ["| name | what it is |", "| --- | --- |"]
    for name, home in names.items():
        said = (ast.get_docstring(documented(home)[name]) or "").partition("\n")[0]
        lines.append(f"| [`{name}`][{home}.{name}] | {said.replace('|', '&#124;')} |")
    return [*lines, ""]


def classes_of(room: str) -> dict[str, str]:
    """The public classes of a room, and the modules that define them."""
    return {
        name: module
        for module in modules_of(room)
        for name, node in documented(module).items()
        if isinstance(node, ast.ClassDef)
    }


def page_of(room: str) -> str:
    """The page of a room, a block for each of its modules.

    It is left out of the search, where its many names would hide the guides; the index is in it.
    """
    lines = ["---", "search:", "  exclude: true", "---", ""]
    lines += [f"# diffusion_lab.{room}", "", docstring_of(PACKAGE / room / "__init__.py"), ""]
    lines += [f"::: {name}\n" for name in modules_of(room)]
    return "\n".join(lines)


def index_page() -> str:
    """The page of the names that `diffusion_lab` itself offers, and of the classes of each room."""
    guide = (PAGES.parent / "python.md").read_text()
    example = guide[guide.index("```python") : guide.index("\n```\n") + 4]
    lines = ["# Python API", "", "[In a script of your own](../python.md):", "", example, ""]
    lines += ["These names are what people extend or call, from `diffusion_lab` itself.", ""]
    by_room = sorted(public_names().items(), key=lambda item: ROOMS.index(item[1].split(".")[1]))
    lines += rows(dict(by_room))
    for room in ROOMS:
        lines += [f"## {room}", "", docstring_of(PACKAGE / room / "__init__.py"), ""]
        lines += [f"All modules and functions: [diffusion_lab.{room}]({room}.md)", ""]
        if classes := classes_of(room):
            lines += rows(classes)
    return "\n".join(lines)


def write_pages(folder: Path, titles: dict[str, str], pages: dict[str, str]) -> None:
    """Write a folder of pages anew, with their navigation; a page without a title has its name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)
    nav = [f"- [{titles.get(name, name)}]({name}.md)" for name in pages]
    (folder / "SUMMARY.md").write_text("\n".join([*nav, ""]))


def main() -> None:
    """Write all pages of the API anew."""
    pages = {"index": index_page()} | {room: page_of(room) for room in ROOMS}
    write_pages(PAGES, {"index": "Python API"}, pages)


if __name__ == "__main__":
    main()
