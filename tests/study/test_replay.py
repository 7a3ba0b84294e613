"""Each study would train again what it has published: the records are the oracle of its file."""

import math
import re
from functools import cache

import pytest
from helpers.paths import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import Means, flat, leave_out, means
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.cli.study import document
from diffusion_lab.cli.study.jobs import Jobs
from diffusion_lab.runs.files import load_record

PUBLISHED = {  # the stages of a study behind each published folder
    "unet_vs_dit/published": ("unet_vs_dit", "train"),
    "unet_vs_dit/published_seconds": ("unet_vs_dit", "seconds"),
    "unet_vs_dit/published_equal_time": ("equal_time", "train"),
    "unet_vs_dit/published_patches": ("unet_vs_dit", "patches"),
    "unet_vs_dit/published_rate": ("unet_vs_dit", "half rates"),
    "crossing/published": ("crossing", "1M"),
    "crossing/published_rates": ("crossing", "rates"),
    "crossing/published_mamba": ("crossing", "Mamba-2"),
    "write_up/published": ("write_up", "train"),
    "cifar10_small/published": ("cifar10_small", "train"),
    "additions/published": ("additions", "train", "train EDM2"),
    "additions/published_fewer": ("additions", "fewer"),
    "scaling/published": ("scaling", "train"),
    "low_data/published": ("low_data", "train"),
    "copies/published": ("copies", "train"),
    "conditioning/published": ("conditioning", "train"),
    "conditioning/published_mamba": ("conditioning", "try-out"),
    "latent/published": ("latent", "pixels", "latents"),
    "families/published": ("families", "pixels", "latents", "codes", "VAE"),
    "few_steps/published": ("few_steps", "train", "reflow", "ect", "distillation"),
    "frontier/published": (
        "frontier",
        *("train", "train alpha", "train sCM", "more seeds", "more seeds of alpha"),
    ),
    "frontier_additions/published": (
        "frontier_additions",
        "train",
        "train iREPA",
        "train DiTs",
        "train DiTs with iREPA",
    ),
    "optimizers/published": ("optimizers", "train"),
    "samplers/published": ("samplers", "train"),
    "guidance/published": ("guidance", "train"),
    "fine_tuning/published_digits": ("fine_tuning", "random", "from clothes"),
    "fine_tuning/published_cifar10": ("fine_tuning", "random", "from clothes"),
}
LEFT = ("budget.", "tuning", "protocol", "logger.", "choices.", "trainer.max_", "data.source.")
SIZES = {
    f"backbone.{key}"
    for key in (
        "width",
        "depth",
        "heads",
        "channels",
        "stage.head_channels",
        "state_space.head_channels",
    )
}
DECIDES = Means.COMPOSITION | Means.LOSS | Means.COST


@cache
def jobs_of(study):
    return Jobs(document.load(study, {}, None), {})


def settings(config):
    """The settings that decide a result, without paths, tuned values and solved sizes."""
    known = flat(config)
    found = {
        key: value
        for key, value in known.items()
        if means(key) & DECIDES
        and Means.PATH not in means(key)
        and not key.startswith(LEFT)
        and not key.endswith("sha256")
    }
    return found | {"seed": known["seed"], "anew": known.get("init_from") is None}


def open_keys(config):
    """The keys that a study leaves to tuning, and to the budget of each run."""
    tuning, budget = config.get("tuning") or {}, config.get("budget") or {}
    sizes = SIZES if budget.get("reference") else set()
    return {*(tuning.get("chosen") or ()), *sizes}


def planned(job):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        command = job.command.replace("-", "_")
        cfg = compose(command, [*job.arguments, "name=x"], return_hydra_config=True)
        leave_out(cfg, cfg.hydra.runtime.choices, job.arguments)
        with_seed = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return OmegaConf.to_container(with_seed, resolve=True)


def differing(own, theirs, left):
    """The keys in which a planned run is not the published one; newer keys are left out."""
    a, b = settings(own), settings(theirs)
    for one, other in ((a, b), (b, a)):  # an option of a group against none
        empty = [key for key, value in one.items() if value is None]
        for key in empty:
            other.setdefault(key, any(each.startswith(f"{key}.") for each in other) or None)
    shared = (a.keys() & b.keys()) - left - {"optimizer.vector_lr"}  # which follows from the rate
    return {key: (a[key], b[key]) for key in shared if a[key] != b[key]} | lengths(own, theirs)


def lengths(own, theirs):
    """How the budgets differ, in what a study fixes."""
    a, b = (each.get("budget") or {} for each in (own, theirs))
    steps = theirs["trainer"]["max_steps"]
    differs = {}
    if a.get("images") and math.ceil(a["images"] / own["batch_size"]) != steps:
        differs["images"] = a["images"], steps
    if b and a.get("seconds") != b.get("seconds"):  # autoencoders had none
        differs["seconds"] = a.get("seconds"), b.get("seconds")
    if a.get("reference") != b.get("reference"):
        differs["reference"] = a.get("reference"), b.get("reference")
    return differs


@pytest.mark.long
@pytest.mark.parametrize("folder", PUBLISHED)
def test_a_study_plans_its_published_runs(folder):
    study, *stages = PUBLISHED[folder]
    runs = sorted((ROOT / "experiments" / folder / "runs").rglob("config.yaml"))
    jobs = [job for stage in stages for job in jobs_of(study).of(stage)]
    if "fine_tuning" in folder:
        axis = "digits" if "digits" in folder else "photographs"
        jobs = [job for job in jobs if job.point["data"] == axis]
    assert len(jobs) == len(runs)
    seeds = [int(re.search(r"^seed: (\d+)$", run.read_text(), re.MULTILINE)[1]) for run in runs]
    first = [run.parent for run, seed in zip(runs, seeds, strict=True) if seed == min(seeds)]
    theirs = [OmegaConf.to_container(load_record(run), resolve=False) for run in first]
    for job in (job for job in jobs if job.settings["seed"] == min(seeds)):
        own = planned(job)
        found = [differing(own, each, open_keys(each)) for each in theirs]
        assert found.count({}) == 1, (job.title, min(found, key=len))
        theirs.pop(found.index({}))  # each is planned once
