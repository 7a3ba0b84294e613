"""Runs of a few seconds on tiny data: their overrides, a first stage, and their logs."""

import json
import operator
import shutil
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from diffusion_lab.common.images import to_float
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.metrics.extractor.classifier import SmallClassifier, save_classifier
from diffusion_lab.runs import checkpoints
from helpers.gpu import SIMULATED
from helpers.tiny_data import TinyData, tiny_data

TINY = [
    "data.source._target_=helpers.tiny_data.TinyData",
    "data.validation_size=20",
    "backbone=dit",
    "backbone.width=32",
    "backbone.heads=2",
    "backbone.depth=1",
    "backbone.patch=4",
    f"trainer.accelerator={'gpu' if SIMULATED else 'cpu'}",
    "+debug=fast",
]
ALONE = ["callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
QUICK = [*TINY, *ALONE, "callbacks.denoising=null"]  # neither measured nor drawn
EVALUATED = [each for each in QUICK if each != "callbacks.evaluation=null"]
PLAIN = [each for each in TINY if not each.startswith("backbone")] + ["logger=none"]
TINY_AUTOENCODER = [*PLAIN, "autoencoder.channels=8", "autoencoder.multipliers=[1,1]"]
ADVERSARIAL = [
    *("reconstruction=perceptual_adversarial", "reconstruction.discriminator.channels=8"),
    *("reconstruction.discriminator.start=2", "reconstruction.perceptual.size=16"),
]
# rates at which few steps change the weights
FAST = ["optimizer.lr=0.01", "lr_schedule.warmup_images=0"]
EDM2 = ["backbone=edm2", "backbone.channels=8", "backbone.multipliers=[1,2]"]
EDM2 += ["backbone.attention=[1]", "backbone.head_channels=8", "objective.label_dropout=0.3"]
FEW_CALLS = {  # objectives of models of few calls
    "mean_flow": ["objective=mean_flow", "objective.loss.guidance=1.5"],
    "shortcut": ["objective=shortcut"],
    "improved_mean_flow": ["objective=improved_mean_flow", "objective.loss.guidance=8"],
    "alpha_flow": ["objective=alpha_flow", "objective.loss.end_images=24"],
    "lagrangian": ["objective=lagrangian"],
    "scm": ["objective=scm", "schedule=cosine"],
    "ect": ["objective=ect", "schedule=edm"],
}
# small models of the other families; codes are of the first stage in the folder `stage`
FAMILIES = {
    "autoregressive": [
        *("family=autoregressive", "first_stage.run=stage", "first_stage.cache_dir=latents"),
        *("backbone.width=16", "backbone.heads=2", "backbone.depth=1"),
    ],
    "gan": [
        *("family=gan", "backbone.channels=8", "backbone.multipliers=[1,2]"),
        *("objective.discriminator.channels=8", "objective.discriminator.layers=2"),
    ],
}


def tiny_first_stage(folder: Path, kind: str = "kl", **facts: object) -> Path:
    """Writes a run folder with an untrained first stage of TinyData and a wrong latent scale."""
    data = tiny_data()
    data.setup("fit")
    settings = {"latent_channels": 4, "channels": 8, "multipliers": [1, 1], "blocks": 1}
    settings |= {"attention": False} | {
        "kl": {"kl_weight": 1e-6},
        "vq": {"codes": 8, "decay": 0.9, "revive_below": 1.0, "commitment_weight": 0.25},
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = saving.KINDS[kind](data.image_shape, **settings)
        model(to_float(data.train_images()))  # initialises the codes by k-means
    known = {
        "kind": kind,
        "settings": settings,
        "image_shape": list(data.image_shape),
        "latent_mean": [0.1] * 4,
        "latent_std": [0.5] * 4,
        "data": data.images_fingerprint,
        "metrics": {"rfid/efficientnet_lite0-96/train64-16": 12.5},
    }
    folder.mkdir(parents=True, exist_ok=True)
    saving.save_autoencoder(
        model, saving.AutoencoderFacts(**(known | facts)), folder / saving.FIRST_STAGE_FILE
    )
    return folder


def tiny_classifier(path: Path, seed: int = 0) -> Path:
    """Writes an untrained classifier of TinyData."""
    facts = {"shape": [1, 8, 8], "classes": list(TinyData.class_names)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_classifier(SmallClassifier((1, 8, 8), 4).eval(), path, facts)
    return path


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, name: str) -> list[float]:
    """The values of a name in metrics.jsonl, in the order of its rows."""
    return [row[name] for row in rows(folder) if name in row]


def steps_of(folder: Path, name: str = "train/loss") -> list[int]:
    """The steps of the rows of metrics.jsonl that have a name."""
    return [row["step"] for row in rows(folder) if name in row]


def checkpoint_of(folder: Path, name: str = "last") -> dict:
    """A checkpoint of a run: `last` or `previous`."""
    return checkpoints.read(folder / f"checkpoints/{name}.ckpt")


def summary_of(folder: Path) -> dict:
    """The summary of a run."""
    return json.loads((folder / "summary.json").read_text())


def same(first: dict, second: dict) -> bool:
    """Whether two states have the same names and values, bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(second[name]))
        for name, value in first.items()
    )


def killed_after_two_steps(whole: Path) -> Path:
    """A copy of a run that keeps the checkpoint of step 2, as a kill after that step leaves it."""
    parts = Path(shutil.copytree(whole, whole.with_name("parts")))
    (parts / "checkpoints/step_0000002.ckpt").replace(parts / "checkpoints/last.ckpt")
    for path in (*parts.glob("checkpoints/previous.ckpt"), *parts.glob("checkpoints/step_*")):
        path.unlink()
    (parts / "summary.json").unlink()
    return parts


def require_equal_training(one: Path, two: Path) -> None:
    """Fails unless the last checkpoints of two runs have the same weights, averages and moments."""
    first, second = (checkpoint_of(folder) for folder in (one, two))
    averaged = {"current_model_state"} & first.keys()  # an autoencoder has no average
    for part in ("state_dict", "optimizer_states", "lr_schedulers", *averaged):
        leaves, others = (dict(tree_flatten_with_path(each[part])[0]) for each in (first, second))
        assert leaves, part
        assert leaves.keys() == others.keys(), part
        for place, value in leaves.items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, others[place]), f"{part}{keystr(place)}"


def wandb_runs(folder: Path) -> set[str]:
    """The ids of the W&B runs in a run folder."""
    # a second file of the same second has a number after the id
    return {path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")}
