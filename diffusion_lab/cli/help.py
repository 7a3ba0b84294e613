"""Help, read from the files in conf/ and their comments, which Hydra would take seconds to list."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml

from diffusion_lab.assembly.sentences import ADDED, conf_dir, require
from diffusion_lab.cli.commands import COMMANDS, OF_LINES, Command, config_dir

RECIPES = ("debug", "experiment", "hparams_search", "study")  # groups of options of many groups
HIDDEN = ("_partial_", "_convert_", "_recursive_")  # keys for Hydra alone
WIDTH, NAMES = 110, 33  # of a line, and of the column of keys
KEY = re.compile(r"^(?P<indent> *)(?P<name>[\w/@.]+):(?P<value>.*)$")


@dataclass
class Key:
    """A key of a configuration file, with its default as it is written there."""

    name: str
    default: str
    comment: str


def head_of(text: str) -> tuple[str, str]:
    """Splits a file into the comment that it begins with, and the rest."""
    lines = text.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = [line.removeprefix("#").strip() for line in lines[:count] if "@package" not in line]
    return "\n".join(comment), "\n".join(lines[count:]).strip()


def sentence_of(text: str) -> str:
    """The first sentence of the comment that a file begins with."""
    comment = head_of(text)[0].replace("\n", " ")
    return re.split(r"(?<=[.?])(?= +[A-Z(]|$)", comment)[0].removesuffix(".")


def keys_of(text: str) -> list[Key]:
    """The keys of a file, nested ones with their full path."""
    keys, path, comment = list[Key](), list[str](), ""
    for line in head_of(text)[1].splitlines():
        value, _, trailing = line.partition(" #")
        found = KEY.match(value)
        if not found:  # a comment on the key below, or an entry of a list
            said = line.strip().removeprefix("#").strip() if line.lstrip().startswith("#") else ""
            comment = f"{comment} {said}".strip() if said else ""
            continue
        path = [*path[: len(found["indent"]) // 2], found["name"]]
        keys.append(Key(".".join(path), found["value"].strip(), trailing.strip() or comment))
        comment = ""
    whole = [key.name for key in keys]
    return [
        key
        for key in keys
        if (key.default or not any(other.startswith(f"{key.name}.") for other in whole))
        and key.name.split(".")[0] != "defaults"
        and key.name.split(".")[-1] not in HIDDEN
    ]


class Options:
    """The groups and options of conf/, and those of a person's own folder."""

    def __init__(self, own: str | None = None):
        self.folders = [conf_dir(), *([Path(own)] if own else [])]

    def files(self, group: str) -> dict[str, Path]:
        """The files of the options of a group; a recipe may lie in a folder of it."""
        pattern = "**/*.yaml" if group in RECIPES else "*.yaml"
        found = {
            path.relative_to(folder / group).with_suffix("").as_posix(): path
            for folder in self.folders
            for path in (folder / group).glob(pattern)
        }
        return dict(sorted(found.items()))

    def inside(self, group: str) -> list[str]:
        """The group itself and those inside of it, if they have options."""
        found = {group}
        for folder in self.folders if group not in RECIPES else ():
            below = (path for path in (folder / group).rglob("*") if path.is_dir())
            found |= {path.relative_to(folder).as_posix() for path in below}
        return sorted(name for name in found if self.files(name))

    @property
    def groups(self) -> list[str]:
        """All groups, each before those inside of it."""
        names = {path.name for each in self.folders for path in each.iterdir() if path.is_dir()}
        return [group for name in sorted(names - {"hydra"}) for group in self.inside(name)]


def command_help(name: str, command: Command, own: str | None) -> str:
    """The help of a command: what it does, its keys, and the groups that it takes."""
    options, config = Options(own), name.replace("-", "_")
    texts = [text for _, text in _files(options, "", config)]
    contents = [_read(text) for text in texts]
    defaults = [entry for content in contents for entry in content.get("defaults", [])]
    chosen = {k: v for each in defaults if isinstance(each, dict) for k, v in each.items()}
    keys: dict[str, Key] = {}
    for key in (key for text in texts for key in keys_of(text)):
        if key.name != "paths" and not key.name.startswith("hydra."):
            keys.setdefault(key.name, key)
    paths = "[PATH ...] " * command.takes_paths
    lines = [f"Usage: diffusion-lab {name} {paths}[key=value ...]", ""]
    lines += [*contents[0]["hydra"]["help"]["header"].rstrip().splitlines(), "", "Keys:"]
    lengths = [len(f"{key.name}={key.default}") for key in keys.values()]
    width = max((length for length in lengths if length <= NAMES), default=NAMES)
    lines += [_row(f"{key.name}={key.default}", key.comment, width) for key in keys.values()]
    known = options.groups
    plain = {key: each for key, each in chosen.items() if key in known}
    if plain:
        lines += ["", "Groups (group=option), with the option that is taken if none is given:"]
    for group, default in plain.items():
        of_run = group in command.run_groups
        taken = "the run's own" if of_run else "none" if default is None else default
        for each in options.inside(group):
            lines.append(_listed(f"{each} ({taken})" if each == group else each, options, each))
    if callbacks := plain.get("callbacks"):
        found = (_read(text) for _, text in _files(options, "callbacks", callbacks))
        names = ", ".join(sorted({name for each in found for name in each} - {"defaults"}))
        lines += [_wrapped(f"callbacks.NAME=null leaves one out: {names}")]
        lines += [_listed(f"+{group}", options, group) for group in ADDED]
    if plain:
        lines += ["", "`diffusion-lab options GROUP` says what each option is, and"]
        lines += ["`diffusion-lab options GROUP=OPTION` shows its keys."]
    return "\n".join(lines)


def _read(text: str) -> dict[str, Any]:
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def _row(name: str, comment: str, width: int) -> str:
    if not comment:
        return f"  {name}"
    start = f"  {name:<{width}}  "
    if len(start) > width + 4:  # a long name has a line of its own
        return f"  {name}\n{_wrapped(comment, ' ' * (width + 4))}"
    return _wrapped(comment, start, " " * len(start))


def _listed(name: str, options: Options, group: str) -> str:
    return _wrapped(f"{name}: {', '.join(options.files(group))}")


def _wrapped(text: str, first: str = "  ", other: str = "      ") -> str:
    return fill(text, WIDTH, initial_indent=first, subsequent_indent=other, break_on_hyphens=False)


def options_help(arguments: Sequence[str], own: str | None) -> str:
    """All groups, the options of the given one, or the file of an option, as in backbone=dit."""
    options = Options(own)
    if not arguments:
        lines = ["Groups; `diffusion-lab options GROUP` says what each of its options is:"]
        return "\n".join([*lines, *(_listed(each, options, each) for each in options.groups)])
    group, _, name = arguments[0].lstrip("+").partition("=")
    require("group", group, options.groups)
    if name:
        require(f"option of {group}", name, options.files(group))
        found = _files(options, group, name)
        return "\n\n".join(f"# {group}={each}\n\n{text}" for each, text in found)
    lines = []
    for each in options.inside(group):
        files = options.files(each)
        width = max(map(len, files))
        lines.append(f"{'+' * (group in ADDED)}{each}=")
        for option, path in files.items():
            lines.append(_row(option, sentence_of(path.read_text()), width))
    return "\n".join(lines)


def _files(options: Options, group: str, name: str) -> Iterator[tuple[str, str]]:
    """The name and text of an option, then of those that it is based on; the group "" is conf/."""
    text = options.files(group)[name].read_text().strip()
    yield name, text
    for entry in _read(text).get("defaults", []):
        if isinstance(entry, str) and entry in options.files(group):
            yield from _files(options, group, entry)


def help_of(arguments: Sequence[str]) -> str | None:
    """The help that a command line asks for; None if it asks for none."""
    name, *rest = arguments
    own = config_dir(rest)
    if name == "options":
        words = [word for word in rest if not word.startswith("-") and word != own]
        return options_help(words, own)
    if not {"-h", "--help"} & set(rest):
        return None
    if name in COMMANDS:
        return command_help(name, COMMANDS[name], own)
    known = [*COMMANDS, *OF_LINES, *Options(own).groups]
    require("command or group", name.partition("=")[0], known)
    return options_help([name], own)
