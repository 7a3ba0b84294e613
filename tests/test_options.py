"""Every setting in conf/ has a declared range, or is known to be free."""

import inspect
import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from helpers.compositions import node
from helpers.paths import CONF
from hydra.utils import get_class
from omegaconf import OmegaConf

from diffusion_lab.assembly.instantiate import instantiate

FREE = {  # texts, and paths and names that are looked up before anything is written
    *("CIFAR10.root", "FashionMNIST.root", "ImageFolder.path", "ImageFolder.test_path"),
    "ImageFolder.label_file",
    *("CIFAR10Zip.path", "CIFAR10Zip.test_path"),
    *("HuggingFace.path", "HuggingFace.config", "HuggingFace.split", "HuggingFace.test_split"),
    *("HuggingFace.image_column", "HuggingFace.label_column", "Guidance.weak_run"),
    "ClassifierGuidance.classifier",
    *("HubVAE.path", "HubVAE.sha256", "TrainedKL.run", "TrainedKL.sha256"),
    *("Classifier.path", "DINOv2.model", "CLIP.model"),
    *("DINOv2.weights_path", "CLIP.weights_path", "Inception.weights_path", "Inception.sha256"),
    *("WandB.project", "WandB.name", "WandB.group", "WandB.run_id", "WandB.tags"),
    *("MLflow.tracking_uri", "MLflow.experiment", "MLflow.name", "MLflow.group", "MLflow.run_id"),
    "MLflow.tags",
    *("Trackio.project", "Trackio.name", "Trackio.group", "Trackio.run_id", "Trackio.tags"),
    "MedianPruning.metric",
    *("TeacherModel.sha256", "TeacherPairs.sha256"),
    *("Budget.solved",),  # filled in by the program
    "ImageData.source",  # an object of another file
    "GPU.name",
}


def settings_of(node: object) -> Iterator[tuple[str, str]]:
    """Yields the classes of this package in a plain configuration, each with a scalar setting."""
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for each in inside:
        yield from settings_of(each)
    name = node.get("_target_", "") if isinstance(node, dict) else ""
    if name.startswith("diffusion_lab."):
        for setting, value in node.items():
            if setting[0] != "_" and setting != "defaults" and not isinstance(value, dict):
                yield name, setting


def declared(name: str) -> set[str]:
    """The arguments of a class whose ranges it or its parents declare."""
    found: set[str] = set()
    for parent in get_class(name).__mro__:
        if build := vars(parent).get("__init__"):
            with suppress(TypeError):  # written in C
                found |= inspect.getclosurevars(build).nonlocals.get("allowed", {}).keys()
    return found


def test_every_setting_has_a_range_or_is_known_to_be_free():
    nodes = [OmegaConf.to_container(OmegaConf.load(path)) for path in CONF.rglob("*.yaml")]
    settings = {found for node in nodes for found in settings_of(node)}
    assert len(settings) > 100
    without = {
        f"{name.rpartition('.')[2]}.{setting}"
        for name, setting in settings
        if setting not in declared(name)
    }
    assert without == FREE


@pytest.mark.parametrize("option", ["dit", "unet", "mamba", "edm2", "mlp"])
def test_a_network_without_arguments_is_the_option(option):
    cfg = OmegaConf.create({"backbone": node("backbone", option)})
    if "bandwidth" in cfg.backbone:
        cfg.backbone.bandwidth = 1.0  # of log sigma, for which it is `auto`
    size = (1, 2, (28, 28))
    configured = instantiate(cfg, "backbone")(*size)
    ours = get_class(cfg.backbone._target_)(1, 2, 28)
    assert repr(ours) == repr(configured)


@pytest.mark.parametrize(
    "option",
    [
        *("annealed_langevin", "ddpm", "deis", "dpm_solver", "dpm_solver_2s_ancestral", "euler"),
        *("few_step", "flow_map", "heun", "ipndm", "predictor_corrector", "restart"),
        *("reverse_sde", "runge_kutta", "unipc"),
    ],
)
def test_a_sampler_without_arguments_is_the_option(option):
    def facts(sampler):
        grid = sampler.time_grid
        kept = {key: value for key, value in vars(sampler).items() if key != "time_grid"}
        return json.dumps([kept, type(grid).__name__, vars(grid)])  # tuples are as lists

    cfg = OmegaConf.create({"sampler": node("sampler", option)})
    configured = instantiate(cfg, "sampler")
    assert facts(type(configured)()) == facts(configured)
