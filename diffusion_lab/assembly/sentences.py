"""Turns each error of a command line into one sentence."""

import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError

import diffusion_lab
from diffusion_lab.assembly.config_keys import leave_out
from diffusion_lab.common.messages import UserError

# arguments of compositions: Hydra 1.3 needs one that 1.4 deprecates
HYDRA_VERSION: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}
PLAIN = re.compile(r"[\w./@%+-]+|\$\{[^'\"]*\}")  # text that Hydra reads without quotes
WORDS = ("null", "true", "false", "nan", "inf")  # without quotes they are no text
# users' errors, shown without trace
MISTAKES = (UserError, HydraException, OmegaConfBaseException, MarkedYAMLError)
MOVED = {  # keys of earlier versions, and what took their place
    "objective.weighting": "objective.loss.weighting",
    "objective.variance_loss": "objective.loss.variance",
    "objective.uncertainty": "objective.loss.uncertainty",
    "objective.huber": "objective.loss.huber",
    "objective.jump_loss": "objective.loss",
    "objective.score_loss": "objective.loss",
}
MEANT = {  # words for keys that have longer names here
    "batch": "batch_size",
    "cfg": "guidance.scale, with guidance=classifier_free",
    "device": "trainer.accelerator",
    "devices": "trainer.devices",
    "ema": "callbacks.weight_averaging",
    "epochs": "trainer.max_steps",
    "gpus": "trainer.devices",
    "image_size": "data.source.image_size, of your own images",
    "images": "budget.images, with budget=images",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "max_steps": "trainer.max_steps",
    "max_time": "trainer.max_time",
    "num_images": "num_samples",
    "precision": "trainer.precision",
    "scale": "guidance.scale",
    "steps": "sampler.steps, or trainer.max_steps of a training",
    "wandb": "logger",
    "weight_decay": "optimizer.weight_decay",
    "width": "backbone.width",
}
ADDED = ("debug",)  # groups that are written +group=option
MANY = 30  # options that a sentence lists
# option of a Hydra plugin -> the extra of this package that installs the plugin
EXTRAS = {
    "hydra/launcher/diffusion_lab_slurm": "slurm",
    "hydra/launcher/joblib": "joblib",
    "hydra/sweeper/optuna": "optuna",
}


def sentence(error: BaseException) -> str:
    """Says what is wrong and what to write instead, for one of MISTAKES."""
    text = str(error).strip()
    if isinstance(error, UserError):
        return text
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem}; mend that line"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing(error.missing_cfg_file, list(error.options or []))
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} must be given: write {error.full_key}=..."
    if isinstance(error, OverrideParseException):
        if groups := _groups_with(error.override):
            return f"{error.override} is an option; write {' or '.join(groups)}={error.override}"
        return (
            f"{error.override!r} is not an override; write key=value, and special characters in "
            "quotes of their own: 'name=\"a: b\"'"
        )
    if match := re.search(r"Ambiguous value for argument '(.+?)'", text):
        several = f"{match[1]} has several values, for a run each; write -m in front of it"
        key, _, values = match[1].partition("=")
        return several + f", or {key}=[{values}] for all in one run" * (key == "logger")
    if match := re.search(r"Could not override '(.+?)'", text):  # the error has no key
        return _unknown(match[1])
    if match := re.search(r"Error merging override (.+)", text):
        return f"{match[1]} is of another kind than the value there, which --cfg job shows"
    if match := re.search(r"You must specify '(.+?)'", text):
        options = sorted(path.stem for path in (conf_dir() / match[1]).glob("*.yaml"))
        return f"{match[1]} must be given: write {match[1]}= and one of {', '.join(options)}"
    return text.splitlines()[0] if text else "the configuration is invalid"


def _groups_with(option: object) -> list[str]:
    """The groups of a training that have an option of this name, such as backbone for dit."""
    if not re.fullmatch(r"\w+", name := str(option)):
        return []
    found = sorted(each.parent.name for each in conf_dir().glob(f"*/{name}.yaml"))
    return [each for each in found if each != "kind"]


def _missing(name: str, options: list[str]) -> str:
    """The sentence for a missing configuration file, such as backbone/dti."""
    if extra := EXTRAS.get(name):
        return f"{name} needs a plugin; write pip install 'diffusion-lab[{extra}]'"
    group, _, option = name.rpartition("/")
    if name.startswith("experiment/"):
        group, _, option = name.partition("/")
        folder = conf_dir() / group  # options such as fashion_mnist/dit are in folders of it
        files = (file.relative_to(folder) for file in folder.rglob("*.yaml"))
        options = sorted(file.with_suffix("").as_posix() for file in files)
    if not options:
        return f"{name} does not exist in the configuration folder; see --help for the groups"
    below = [each for each in options if each.startswith((f"{option}/", f"{option}_"))]
    if len(below) > 1:
        return f"{group}={option} does not exist; write {group}= and one of {', '.join(below)}"
    near = did_you_mean(option, below or options)
    other = ", and of PyTorch optimizer=any optimizer._target_=..." * (group == "optimizer")
    return f"{group}={option} does not exist; {near}the options are {_listed(options)}{other}"


def _listed(options: list[str]) -> str:
    """The options; of many those alone that are no variant of another, as dit_s_2 is of dit."""
    if len(options) <= MANY:
        return ", ".join(options)
    first = [one for one in options if not any(one.startswith(f"{other}_") for other in options)]
    return f"{', '.join(first)}, and variants of them, which --help lists"


def _unknown(key: str) -> str:
    """The sentence for an override of a key or a group that the command does not have."""
    for old, new in MOVED.items():
        if key.replace("/", ".").startswith(old):
            now = key.replace("/", ".").replace(old, new, 1)
            return f"{key} is now {now.replace('.', '/') if '/' in key else now}; write that"
    if "/" in key and (conf_dir() / key).is_dir():
        group = key.rpartition("/")[0]
        return f"the {group} that is chosen has no {key}; leave it out, or choose another {group}"
    if key in ADDED:
        return f"{key} is added to a command; write +{key}=..."
    if (conf_dir() / key).is_dir():
        return f"{key} is not part of this command; see --help for its groups"
    if key in MEANT:
        return f"there is no key {key} to override; did you mean {MEANT[key]}?"
    texts = (path.read_text() for path in conf_dir().rglob("*.yaml"))
    known = {name for text in texts for name in re.findall(r"^\s*(\w+):", text, re.MULTILINE)}
    near = did_you_mean(key.rpartition(".")[2], sorted(known))
    return f"there is no key {key} to override; {near}--cfg job lists all keys"


def instead(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is not known."""
    names = list(map(str, known))
    near = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {near[0]}?" if near else f"; use one of {', '.join(names)}"


def require(what: str, name: str, known: Collection[str]) -> None:
    """Raises UserError for a name that is not known."""
    if name not in known:
        raise UserError(f"there is no {what} {name!r}{instead(name, known)}")


def did_you_mean(word: str, words: list[str]) -> str:
    """Asks whether another of the words was meant, if one is close; the start of a sentence."""
    same = [each for each in words if re.sub("_", "", each) == re.sub(r"[\W_]", "", word).lower()]
    close = same or difflib.get_close_matches(word.lower(), words, n=1)
    # the word itself may be a key elsewhere in the configuration
    return f"did you mean {close[0]}? " if close and close[0] != word else ""


@dataclass(frozen=True)
class Combination:
    """One combination of comma-separated values, as in steps=5,10, and its configuration."""

    chosen: dict[str, str]  # values by key
    cfg: DictConfig
    overrides: list[str]

    @property
    def name(self) -> str:
        """The values that were chosen, as they are written; empty for none."""
        return " ".join(f"{key}={value}" for key, value in self.chosen.items())


def parse(overrides: Iterable[str]) -> list[Override]:
    """Parses overrides as Hydra does; raises its OverrideParseException for an invalid one."""
    return OverridesParser.create().parse_overrides(list(overrides))


def text_of(value: object, several: bool = False) -> str:
    """A value in Hydra's syntax; a list is one of `several` values, or a value itself."""
    if isinstance(value, list):
        listed = ",".join(map(text_of, value))
        return listed if several else f"[{listed}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{text_of(each)}" for key, each in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = str(value)
    if not isinstance(value, str) or (PLAIN.fullmatch(text) and text.lower() not in WORDS):
        return text
    return QuotedString(text, Quote.single).with_quotes()


def values_of(overrides: Iterable[str]) -> dict[str, object]:
    """The values that overrides set, by key."""
    return {each.key_or_group: each.value() for each in parse(overrides)}


def key_of(override: Override) -> str:
    """The key or group that an override sets, with its package if it has one."""
    return override.get_key_element().lstrip("+~")


def own_places() -> list[str]:
    """The flag --config-dir of this command, if it has one, for processes that compose it again."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    return [f"--config-dir={each.path}" for each in sources if each.provider == "command-line"]


def conf_dir() -> Path:
    """The folder of configuration groups: inside an installed package, next to it in a checkout."""
    package = Path(diffusion_lab.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def composed(config: str, overrides: list[str]) -> DictConfig:
    """The configuration that Hydra composes where it does not run, with Hydra's own."""
    with initialize_config_dir(str(conf_dir()), **HYDRA_VERSION):
        cfg = compose(config, overrides, return_hydra_config=True)
    leave_out(cfg, cfg.hydra.runtime.choices, overrides)
    return cfg
