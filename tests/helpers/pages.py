"""The commands of the pages, and their blocks that are files."""

import re
import shlex
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import OmegaConf

from diffusion_lab.cli.commands import COMMANDS, prepare
from diffusion_lab.cli.study import document
from diffusion_lab.cli.study.command import check, narrowed, read
from diffusion_lab.cli.study.jobs import Jobs
from diffusion_lab.cli.sweeps import first_values
from helpers.compositions import composed
from helpers.paths import CONF, ROOT

PAGES = ROOT / "docs/pages"
WRITTEN = sorted(PAGES.glob("*.md"))  # those in folders are made from conf/ and docstrings


EXPERIMENTS = sorted((ROOT / "experiments").glob("*/README.md"))


def blocks_of(page: Path, language: str) -> dict[str, str]:
    """The blocks of a page whose first line is the name of a file, by that name."""
    found = re.findall(
        rf"```{language}\n((?:# @.+\n)?# (\S+\.\w+)\n.+?)```", page.read_text(), re.DOTALL
    )
    return {name: text for text, name in found}


def commands_of(page: Path) -> list[str]:
    """The commands of `diffusion-lab` on a page, each in one line."""
    text = re.sub(r" *\\\n +", " ", page.read_text())
    return re.findall(r"^(?:    )?(diffusion-lab .+)$", text, re.MULTILINE)


def check_composes(line: str) -> None:
    """Asserts that a command exists, and that its overrides compose."""
    _, command, *overrides = shlex.split(line)
    if command == "study":
        check_study(overrides)
        return
    overrides = prepare(COMMANDS[command], overrides)
    sweep = "-m" in overrides
    overrides = [o for o in overrides if o not in ("-m", "--cfg", "job")]
    if sweep:
        overrides = first_values(overrides)
    if command in ("train", "train-autoencoder"):
        overrides.append("name=x")  # the default asks Hydra, which is not running
    config = command.replace("-", "_")
    parsed = OverridesParser.create().parse_overrides(overrides)
    others = sorted(each.input_line for each in parsed if not changes_a_key(each))
    cfg = composed(config, *others)  # once for all lines that choose the same
    for key in (each.key_or_group for each in parsed if changes_a_key(each)):
        above, _, name = key.rpartition(".")
        if name not in ((OmegaConf.select(cfg, above) if above else cfg) or ()):
            assert composed(config, *overrides)  # Hydra knows keys of parts that are chosen later
            return


def changes_a_key(override: Override) -> bool:
    """Whether an override only changes the value of a key; Hydra composes the others once."""
    key = override.key_or_group
    return override.type is OverrideType.CHANGE and "@" not in key and not (CONF / key).is_dir()


def check_study(arguments: list[str]) -> None:
    """Asserts that there is such a study, and that its first training composes."""
    asked = read(arguments)
    if asked.name is None:
        return
    jobs = Jobs(document.load(asked.name, asked.own, asked.config_dir), asked.given)
    wanted = narrowed(jobs, asked.only)
    assert wanted
    check(jobs, [job for job in wanted if job.command in document.TRAINS][:1], [], asked.config_dir)
