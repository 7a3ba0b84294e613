"""Write the option pages, docs/pages/options/, from the files in conf/ and their comments."""

import re
from pathlib import Path

import yaml
from api import defining, write_pages

from diffusion_lab.cli.help import RECIPES, Key, Options, head_of, keys_of, sentence_of

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
PAGES = ROOT / "docs/pages/options"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
OPTIONS = Options()


def cell(text: str) -> str:
    """Text that does not end a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Text as code, if there is any."""
    return f"`{cell(text)}`" if text else ""


def anchor(group: str, name: str) -> str:
    """The anchor of an option; those of a group inside of a group begin with its name."""
    return "-".join([*group.split("/")[1:], *name.split("/")])


def of_which(group: str, text: str) -> str:
    """Sentences on the options that an option begins with: one of its own group, and parts."""
    own, parts = [], []
    for entry in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(entry, dict):
            for key, name in entry.items():
                part = key.removeprefix("override ").lstrip("/").partition("@")[0]
                inside = (CONF / group / part).is_dir() and not key.startswith("override /")
                parts.append(f"`{f'{group}/{part}' if inside else part}={name}`")
        elif entry in options_of(group):
            own.append(f"[`{entry}`](#{anchor(group, entry)})")
        elif entry != "_self_":
            own.append(f"`{entry}`")
    sentences = []
    if own:
        sentences.append(f"Has all keys of {' and '.join(own)}; what differs is below.")
    if parts:
        sentences.append(f"Made with {', '.join(parts)}.")
    return " ".join(sentences)


def table_of(keys: list[Key], prefix: str = "") -> list[str]:
    """The keys as the rows of a table, written as on the command line."""
    if not keys:
        return []
    rows = [f"| `{prefix}{key.name}` | {code(key.default)} | {cell(key.comment)} |" for key in keys]
    return ["| key | default | what it is |", "| --- | --- | --- |", *rows, ""]


def class_link(target: str) -> str:
    """The name of a class, linked to the API's pages if it is of this package."""
    module, _, name = target.rpartition(".")
    if not module.startswith("diffusion_lab"):
        return f"`{target}`"
    return f"[`{target}`][{defining(module, name)}.{name}]"


def section_of(group: str, name: str) -> list[str]:
    """One option: what its file says of it, its parts and its keys."""
    text = (CONF / group / f"{name}.yaml").read_text()
    depth = "###" if "/" in group else "##"
    lines = [f"{depth} {name} {{ #{anchor(group, name)} }}", ""]
    if group in RECIPES:
        return [*lines, "```yaml", *text.strip().splitlines(), "```", ""]
    lines += [cell(head_of(text)[0].replace("\n", " ")), ""]
    if made := of_which(group, text):
        lines += [made, ""]
    keys = keys_of(text)
    lines += [f"Class: {class_link(key.default)}\n" for key in keys if key.name == "_target_"]
    named = group in ("callbacks", "logger") and name != "none"
    prefix = f"{group}.{name}." if named else f"{group.replace('/', '.')}."
    return [*lines, *table_of([key for key in keys if key.name != "_target_"], prefix)]


def page_of(group: str) -> str:
    """The page of a group and the groups inside it: a table of options, then a section for each."""
    lines = [] if options_of(group) else [f"# {group}", ""]
    for part in OPTIONS.inside(group):
        names, depth = options_of(part), "##" if "/" in part else "#"
        lines += [f"{depth} {part} {{ #{part.replace('/', '-')}-options }}", ""]
        lines += [how_written(part), ""]
        lines += ["| option | what it is |", "| --- | --- |"]
        for name in names:
            sentence = cell(sentence_of((CONF / part / f"{name}.yaml").read_text()))
            lines.append(f"| [`{name}`](#{anchor(part, name)}) | {sentence} |")
        lines += ["", *(line for name in names for line in section_of(part, name))]
    return "\n".join(lines)


def how_written(group: str) -> str:
    """The sentence on how an option of a group is chosen."""
    if group == "callbacks":
        example = "callbacks.evaluation.every_n_steps=5000"
        return f"Parts of a run. Write their keys as in `{example}`, or `callbacks.NAME=null`."
    if group == "study":
        return "Run by `diffusion-lab study NAME`; the files are in `conf/study/`."
    plus = "+" if group == "debug" else ""
    return f"Written `{plus}{group}=NAME`; the files are in `conf/{group}/`."


def options_of(group: str) -> list[str]:
    """The options of a group; a recipe may lie in a folder, as in `fashion_mnist/dit`."""
    return list(OPTIONS.files(group))


def commands_page() -> str:
    """The page of the commands: their help, and their keys that belong to no group."""
    lines = ["# Commands", "", "Commands are written `diffusion-lab COMMAND key=value ...`.", ""]
    lines += ["`diffusion-lab COMMAND --help` prints the keys and groups of one.", ""]
    for name in sorted(path.stem for path in CONF.glob("*.yaml")):
        text = (CONF / f"{name}.yaml").read_text()
        content = yaml.safe_load(text)
        help_text = content.get("hydra", {}).get("help", {}).get("header", "")
        if not help_text:  # what commands share; its keys are added to theirs
            continue
        # the lines of a command are indented by two, and a block of code by four
        body = re.sub(r"^  ", "    ", help_text.strip(), flags=re.MULTILINE)
        lines += [f"## {name.replace('_', '-')}", "", *body.splitlines(), ""]
        keys = [key for key in keys_of(text) if not key.name.startswith("hydra.")]
        shared = [entry for entry in content["defaults"] if isinstance(entry, str)]
        for entry in shared:
            if entry in ("run_command", "model_command"):
                keys += keys_of((CONF / f"{entry}.yaml").read_text())
        lines += table_of(keys)
    return "\n".join(lines)


def index_page() -> str:
    """The page of all groups, with a sentence from each file of theirs."""
    lines = [
        "# Options",
        "",
        "Every folder in `conf/` is a group, and every file in it an option: `backbone=dit` takes",
        "`conf/backbone/dit.yaml`. Its keys are written with the name of the group in front:",
        "`backbone.depth=6`. These pages are made from the files and their comments.",
        "",
        "| group | options |",
        "| --- | --- |",
    ]
    for group in GROUPS:
        for part in OPTIONS.inside(group):
            names = " ".join(
                f"[`{name}`]({group}.md#{anchor(part, name)})" for name in options_of(part)
            )
            lines.append(f"| [`{part}`]({group}.md#{part.replace('/', '-')}-options) | {names} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Write all pages of options anew."""
    pages = {"index": index_page(), "commands": commands_page()}
    pages |= {group: page_of(group) for group in GROUPS}
    write_pages(PAGES, {"index": "Options", "commands": "Commands"}, pages)


if __name__ == "__main__":
    main()
