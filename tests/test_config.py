"""Configurations: options have the path of their class and all its arguments, and all compose."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers.compositions import composed
from helpers.pages import check_composes
from helpers.paths import CONF
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.cli.study import document
from diffusion_lab.cli.study.document import TRAINS
from diffusion_lab.cli.study.jobs import Jobs, StudyJob

# arguments that come from the data or the run when an object is built, not from a configuration
FACTS = {
    "autoencoder": {"image_shape"},
    "backbone": {"in_channels", "out_channels", "image_size"},
    "backbone/block": {"width", "mixer"},
    "alignment": {"denoiser", "schedule"},
    "backbone/embedding": {"channels"},
    "backbone/norm": {"channels", "silu"},
    "backbone/stage": {
        "in_channels",
        "channels",
        "embedding_width",
        "attends",
        "resample",
        "project",
        "norm",
    },
    "backbone/state_space": {"channels"},
    "conditioning": {"labels", "width"},
    "first_stage": {"image_shape"},
    "objective": {"schedule", "coupling"},
    "optimizer": {"parameters"},
    "reconstruction": {"image_channels"},
    "reconstruction/discriminator": {"image_channels"},
    "logger": {"run_dir", "clock", "config", "resumed_from"},
}
OURS = "diffusion_lab."
# facts of classes in groups whose other classes have other facts
OF_FAMILIES = {
    "CodeTransformer": {"codes", "tokens", "labels", "conditioning"},
    "ConvGenerator": {"image_shape", "labels", "conditioning"},
    "RelativisticLoss": {"image_channels", "labels", "conditioning"},
    "Discriminator": {"image_channels", "labels", "conditioning"},
    "NextCode": set(),
}
ELSEWHERE = ("diffusion_lab.families.", "diffusion_lab.backbone.discriminator.")
# whole recipes, which configure parts of other groups
DOCUMENTS = ("experiment", "debug", "family", "study", "hparams_search", "hydra")
GROUP_FILES = sorted(
    path
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF and path.relative_to(CONF).parts[0] not in DOCUMENTS
)
STUDIES = sorted((CONF / "study").glob("*.yaml"))
EXPERIMENTS = sorted(path for path in (CONF / "experiment").rglob("*.yaml"))


def option(path: Path) -> tuple[str, str]:
    """The (group, option) of a file: ("objective/prediction", "v")."""
    relative = path.relative_to(CONF).with_suffix("")
    return str(relative.parent), relative.name


def node_of(path: Path):
    """The configuration of an option, with its own defaults, and its group as a list."""
    group, name = option(path)
    chosen = re.findall(r"override /(\w+)@\S+: (\w+)", path.read_text())  # of other groups
    cfg = composed(None, *(f"+{other}={option}" for other, option in chosen), f"+{group}={name}")
    key = f"{group}.{name}" if group == "logger" else group.replace("/", ".")
    return OmegaConf.select(cfg, key), group.split("/")


def replaces_by_null(path: Path) -> bool:
    """Whether an option switches its group off, by null in the place of the group."""
    return bool(re.match(r"# @package (?!logger\.)", path.read_text()))


GROUPS = sorted({path.parent for path in GROUP_FILES})


@pytest.mark.parametrize("folder", GROUPS, ids=lambda p: p.relative_to(CONF).as_posix())
def test_each_option_names_a_class_of_its_group_and_all_its_parameters(folder):
    for path in folder.glob("*.yaml"):
        check_option(path)


def check_option(path: Path) -> None:
    if replaces_by_null(path):
        body = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "defaults"}
        assert list(body.values()) == [None]
        return
    cfg, group = node_of(path)
    for callback in cfg.values() if group == ["callbacks"] else ():
        check_class(callback, group)
    if group != ["callbacks"]:
        check_class(cfg, group)


def check_class(cfg: DictConfig, group: list[str]) -> None:
    if OmegaConf.is_missing(cfg, "_target_"):  # of any class
        return
    target = cfg._target_
    keys = {str(key) for key in cfg if not str(key).startswith("_")}
    signature = inspect.signature(get_object(target)).parameters
    if not target.startswith(OURS):
        assert keys <= set(signature)
        return
    facts = OF_FAMILIES.get(target.rpartition(".")[2], FACTS.get("/".join(group), set()))
    same_place = f".{'.'.join(group)}." in target or target.startswith(ELSEWHERE)
    assert same_place, "same name, same place"
    assert not [p for p in signature.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert keys == set(signature) - facts
    if "source" in cfg and not OmegaConf.is_missing(cfg, "source"):  # not a group of its own
        parameters = set(inspect.signature(get_object(cfg.source._target_)).parameters)
        assert {str(key) for key in cfg.source} == parameters | {"_target_"}
    # partial exactly if arguments come when the object is built
    assert cfg.get("_partial_", False) == bool(facts & set(signature))


# overrides of keys below a group, as in +a.b={c: d} or a.b=c
SHOWN = re.compile(
    r"([+~]?[a-z_]+[.@][\w@./]+={[^}]+})|(?<![\w./@=])([+~]?[a-z_]+[.@][\w@./]+=[\w./@-]*\w)"
)


def shown_in(path: Path) -> list[str]:
    """The overrides that the comments of a file show."""
    comments = " ".join(re.findall("# (.+)", path.read_text()))
    return [nested or plain for nested, plain in SHOWN.findall(comments)]


def test_every_override_that_a_comment_shows_composes():
    showing = [path for path in GROUP_FILES if shown_in(path)]
    assert len(showing) > 5
    for path in showing:
        group, name = option(path)
        assert composed("train", f"{group}={name}", *shown_in(path), "name=x")


def jobs_of(study: str) -> list[StudyJob]:
    """The jobs of a study, with a trial of each that tunes in its place."""
    jobs = Jobs(document.load(study, {}, None), {})
    return [jobs.first_of(job)[0] for job in jobs.all]


def check(job: StudyJob) -> None:
    check_composes(shlex.join(["diffusion-lab", job.command, *job.arguments]))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_is_read_and_says_how_it_is_run(path):
    assert f" diffusion-lab study {path.stem}\n" in path.read_text()
    trained = [job for job in jobs_of(path.stem) if job.command in TRAINS]
    assert all(job.made.is_relative_to(f"outputs/{path.stem}") for job in trained)
    assert len({job.made for job in trained}) == len(trained)
    check(max(trained, key=lambda job: len(job.arguments)))


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_commands_of_every_stage_of_a_study_compose(path):
    for job in {(job.stage, job.label): job for job in jobs_of(path.stem)}.values():
        check(job)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: "/".join(option(p)))
def test_every_experiment_composes_and_says_how_it_is_run(path):
    name = str(path.relative_to(CONF / "experiment").with_suffix(""))
    command = re.search(rf"diffusion-lab (\S+) experiment={name}\b", path.read_text())
    assert command, "the header comment gives the command"
    train = command[1] == "train"
    unguided = ["guidance=none"] if train else []  # no experiment may override it
    cfg = composed(command[1].replace("-", "_"), f"experiment={name}", *unguided)
    assert cfg.name
    assert not train or cfg.guidance.scale == 1
    OmegaConf.to_container(cfg)
