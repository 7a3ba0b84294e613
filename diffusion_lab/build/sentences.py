"""What Hydra and OmegaConf say of a wrong command line, as one sentence each."""

import difflib
import re
from pathlib import Path

# Hydra's plugins, by the name of their options, and the extra of this package that installs each
LAUNCHERS = {"submitit_slurm": "slurm", "joblib": "joblib", "ray": "ray"}


def sentence(error: BaseException, conf: Path) -> str:
    """One sentence naming what is wrong and what to write instead."""
    text = str(error)
    match = re.search(r"Could not find 'hydra/launcher/(\w+)'", text)
    if match and (extra := LAUNCHERS.get(match[1])):
        return f"hydra/launcher={extra} needs a plugin; write pip install 'diffusion-lab[{extra}]'"
    if re.search(r"Could not find 'hydra/sweeper/optuna'", text):
        return "a search needs Optuna; write pip install 'diffusion-lab[optuna]'"
    if match := re.search(
        r"Could not find '(.+)/(.+)'\s+Available options in '.+':\n((\t.+\n?)+)", text
    ):
        group, option, offered = match[1], match[2], match[3].split()
        near = _near(option, offered)
        return f"{group}={option} does not exist; {near}the options are {', '.join(offered)}"
    if match := re.search(r"Could not override '(.+)'", text):
        key = match[1]
        if (conf / key).is_dir():
            return f"{key} is not part of this command; see --help for its groups"
        near = _near(key.split(".")[-1], _known_keys(conf))
        return f"there is no key {key} to override; {near}--cfg job lists the keys there are"
    if match := re.search(r"Could not find '(.+)'", text):
        return f"{match[1]} does not exist in the configuration folder; see --help for the groups"
    if match := re.search(r"Missing mandatory value: (.+)", text):
        return f"{match[1]} must be given: write {match[1]}=..."
    if match := re.search(r"parsing override '(.*)'", text):
        return f"{match[1]!r} is no override; write key=value, in quotes if it has special signs"
    if "no viable alternative" in text or "mismatched input" in text:
        return f"an override cannot be read ({_first_line(text)}); check brackets and quotes"
    return _first_line(text)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "the configuration is wrong"


def _near(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    # the same word is a key of something else
    return f"did you mean {close[0]}? " if close and close[0] != word else ""


def _known_keys(conf: Path) -> list[str]:
    """Every key written in any configuration file."""
    texts = (path.read_text() for path in conf.rglob("*.yaml"))
    return sorted({key for text in texts for key in re.findall(r"^\s*(\w+):", text, re.MULTILINE)})
