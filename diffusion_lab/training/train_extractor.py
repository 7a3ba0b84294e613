"""Trains the small classifier whose features and predicted classes metrics can use."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.objects import build_images, read_data
from diffusion_lab.common.messages import UserError, progress_bar, say
from diffusion_lab.common.ranges import above, whole
from diffusion_lab.compute.device import pick_device
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.classifier import (
    SmallClassifier,
    accuracy_on,
    fit,
    save_classifier,
)


def train_extractor(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Trains on the training images, tests on the test images, and writes `cfg.output`.

    Raises UserError if there are no classes to learn, the file exists, or training diverges.
    """
    check_keys(cfg, {"epochs": whole(1), "batch_size": whole(2), "seed": whole(0), "lr": above(0)})
    path = Path(cfg.output)
    if path.exists():
        raise UserError(
            f"{path} already exists, and metrics may have been measured with it; use it with "
            f"metrics.classifier={path}, or choose another output=..."
        )
    device = pick_device(cfg.device)
    datamodule = build_images(cfg)
    read_data(cfg, datamodule)
    if datamodule.num_classes < 2:
        raise UserError("a classifier needs data with at least 2 classes, but these have fewer")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # fails before minutes of training
    except OSError as error:
        raise UserError(f"output={path} cannot be created ({error}); choose another") from error
    torch.manual_seed(cfg.seed)
    network = SmallClassifier(datamodule.native_shape, datamodule.num_classes).to(device)
    with progress_bar("Training the classifier", cfg.epochs) as advance:
        data = datamodule.train_images(), datamodule.train_labels()
        fit(network, *data, cfg.epochs, cfg.batch_size, cfg.lr, advance)
    accuracy = accuracy_on(network.eval(), datamodule.test_images(), datamodule.test_labels())
    facts = {
        "shape": list(datamodule.native_shape),
        "classes": list(datamodule.class_names),
        "data": datamodule.fingerprint,
        "test_accuracy": accuracy,
        "epochs": cfg.epochs,
        "seed": cfg.seed,
    }
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise UserError(f"the classifier diverged at lr={cfg.lr}; write a smaller lr, such as 2e-3")
    save_classifier(network, path, facts)
    name = Classifier(str(path))
    name.load("cpu")
    say(f"{name.name} classifies {accuracy:.1%} of the test images correctly: {path}")
    say(
        f"Use it with metrics.classifier={path} or metrics=classifier metrics.extractor.path={path}"
    )
    return {"path": str(path), "name": name.name, "test_accuracy": accuracy}
