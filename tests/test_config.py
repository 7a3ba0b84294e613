"""Configuration: same name, same place; the constructor is the schema; everything composes."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from helpers.paths import CONF
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

# given when the object is built, from the data or the run, never in a configuration
FACTS = {
    "autoencoder": {"image_shape"},
    "backbone": {"in_channels", "out_channels", "image_size"},
    "backbone/block": {"width", "mixer"},
    "conditioning": {"num_classes", "width"},
    "objective": {"schedule"},
    "reconstruction": {"image_channels"},
    "reconstruction/discriminator": {"image_channels"},
    "callbacks": {"pipeline", "folder", "metrics"},
    "logger": {"run_dir", "clock", "config"},
}
OURS = "diffusion_lab."
# whole recipes, which configure parts of other groups
DOCUMENTS = ("experiment", "debug", "study", "hparams_search", "hydra")
GROUP_FILES = sorted(
    path
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF and path.relative_to(CONF).parts[0] not in DOCUMENTS
)
STUDIES = sorted((CONF / "study").glob("*.yaml"))
EXPERIMENTS = sorted(path for path in (CONF / "experiment").rglob("*.yaml"))


def option(path: Path) -> tuple[str, str]:
    """(group, option) of a file: ("objective/prediction", "v")."""
    relative = path.relative_to(CONF).with_suffix("")
    return str(relative.parent), relative.name


@pytest.fixture
def hydra_conf():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def node_of(path: Path):
    """The configuration that an option gives, with its own defaults, and its group as a list."""
    group, name = option(path)
    cfg = compose(overrides=[f"+{group}={name}"])
    return OmegaConf.select(cfg, group.replace("/", ".")), group.split("/")


def replaces_by_null(path: Path) -> bool:
    """Options that switch a group off write null into the place of their group."""
    return path.read_text().startswith("# @package")


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: "/".join(option(p)))
def test_an_option_names_a_class_of_its_group_and_all_its_parameters(path, hydra_conf):
    if replaces_by_null(path):
        body = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "defaults"}
        assert list(body.values()) == [None]
        return
    cfg, group = node_of(path)
    target = cfg._target_
    keys = {str(key) for key in cfg if not str(key).startswith("_")}
    signature = inspect.signature(get_object(target)).parameters
    assert not [p for p in signature.values() if p.kind == p.VAR_KEYWORD and OURS in target]
    if target.startswith(OURS):
        assert f".{'.'.join(group)}." in target, "same name, same place"
        assert keys == set(signature) - FACTS.get("/".join(group), set())
    else:
        assert keys <= set(signature)


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: "/".join(option(p)))
def test_the_yaml_says_partial_exactly_where_facts_are_missing(path, hydra_conf):
    if replaces_by_null(path):
        return
    cfg, group = node_of(path)
    if cfg._target_.startswith(OURS):
        facts = FACTS.get("/".join(group), set())
        signature = inspect.signature(get_object(cfg._target_)).parameters
        assert cfg.get("_partial_", False) == bool(facts & set(signature))


def test_no_class_of_a_configuration_takes_arbitrary_keywords(hydra_conf):
    for path in GROUP_FILES:
        if not replaces_by_null(path):
            target = node_of(path)[0]._target_
            if target.startswith(OURS):
                kinds = [p.kind for p in inspect.signature(get_object(target)).parameters.values()]
                assert inspect.Parameter.VAR_KEYWORD not in kinds


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_composes_and_says_how_it_is_run(path, hydra_conf):
    assert f"diffusion-lab train -m +study={path.stem}\n" in path.read_text()
    chosen = [f"+study={path.stem}", "name=x"]
    cfg = compose("train", overrides=chosen, return_hydra_config=True)
    assert cfg.study_name == path.stem
    assert instantiate(cfg.budget)
    for key, values in cfg.hydra.sweeper.params.items():
        for value in str(values).split(","):
            assert compose("train", overrides=[*chosen, f"{key}={value}"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: "/".join(option(p)))
def test_every_experiment_composes_and_says_how_it_is_run(path, hydra_conf):
    name = str(path.relative_to(CONF / "experiment").with_suffix(""))
    command = re.search(rf"diffusion-lab (\S+) experiment={name}\b", path.read_text())
    assert command, "the header comment gives the command"
    cfg = compose(command[1].replace("-", "_"), overrides=[f"experiment={name}"])
    assert cfg.name
    OmegaConf.to_container(cfg)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: "/".join(option(p)))
def test_no_experiment_guides_where_guidance_is_none(path, hydra_conf):
    name = path.relative_to(CONF / "experiment").with_suffix("")
    if "diffusion-lab train " in path.read_text():
        assert (
            compose("train", overrides=[f"experiment={name}", "guidance=none"]).guidance.scale == 1
        )
