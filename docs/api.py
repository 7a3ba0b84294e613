"""Write the API pages, docs/pages/api/, which mkdocstrings fills from the docstrings."""

import ast
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion_lab"
PAGES = ROOT / "docs/pages/api"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


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


def classes_of(room: str) -> dict[str, str]:
    """The public classes of a room by their full names, with the first line of their docstring."""
    found = {}
    for module in modules_of(room):
        path = ROOT / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(file.read_text()).body:
            public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            if public and (docstring := ast.get_docstring(node)):
                found[f"{module}.{node.name}"] = docstring.partition("\n")[0]
    return found


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
    lines = [
        "# Python API",
        "",
        "These names are what people extend or call, as in `from diffusion_lab import Sampler`:",
        "",
        "| name | where it is defined |",
        "| --- | --- |",
    ]
    lines += [f"| [`{name}`][{home}.{name}] | `{home}` |" for name, home in public_names().items()]
    lines += [""]
    for room in ROOMS:
        lines += [f"## {room}", "", docstring_of(PACKAGE / room / "__init__.py"), ""]
        lines += [f"All modules and functions: [diffusion_lab.{room}]({room}.md)", ""]
        if classes := classes_of(room):
            lines += ["| class | what it is |", "| --- | --- |"]
            lines += [
                f"| [`{name.rpartition('.')[2]}`][{name}] | {line.replace('|', '&#124;')} |"
                for name, line in classes.items()
            ]
            lines.append("")
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
