"""Memorisation of a trained run: neighbours, FID and loss on training and test images."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab import runs
from diffusion_lab.analysis import plots
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.common import hashing
from diffusion_lab.common.files import write_json
from diffusion_lab.common.images import to_float
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import whole
from diffusion_lab.compute.cache import cached
from diffusion_lab.data import Split
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.metrics.distances import FeatureSet, frechet
from diffusion_lab.metrics.features import FEATURES
from diffusion_lab.metrics.metric import with_fingerprint
from diffusion_lab.metrics.neighbours import MEANINGS, Neighbours, equal_sides
from diffusion_lab.metrics.observer import Observer
from diffusion_lab.metrics.real_images import RealImages
from diffusion_lab.pipeline import draw
from diffusion_lab.runs.results import sampling_of
from diffusion_lab.training.diffusion_module import VALIDATION_LEVELS, losses_by_level


def memorization(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Measures `cfg.run` on `cfg.num_samples` samples; writes report.json and two pictures.

    Sampler, guidance and extractor are the run's own, unless `overrides` say otherwise.
    """
    least = {"num_samples": 2, "batch_size": 1, "pairs": 1, "seed": 0}
    check_keys(cfg, {key: whole(number) for key, number in least.items()})
    opened = runs.open_diffusion_run(cfg)
    runs.inherit(cfg, opened.saved, ("sampler", "guidance", "metrics"), overrides)
    pipeline, metrics, data = opened.pipeline(cfg), opened.metrics(cfg), opened.datamodule
    training, test = data.train_images(), data.test_images()
    sides = equal_sides(data.train_labels(), data.test_labels())
    if len(sides[0]) < 2:
        raise UserError("memorisation needs 2 training and 2 test images of the same classes")
    folder = made(Path(cfg.output or Path(cfg.run) / "memorization"))
    with opened.autocast:
        batches = draw(pipeline, range(cfg.num_samples), cfg.batch_size, cfg.seed)
        samples = torch.cat([data.to_native(batch.cpu()) for batch in batches])
    mirrored = bool(data.flip or getattr(opened.model.augmentation, "flip_x", False))
    spaces, fid = compared(metrics, samples, test, training, sides, mirrored)
    losses = loss_gap(opened, cfg.batch_size)
    # everything but the training images that decides how copies are counted
    protocol = {
        "extractor": metrics.extractor.name,
        "extractor_fingerprint": metrics.extractor.fingerprint,
        "num_samples": cfg.num_samples,
        "test": hashing.of_tensors([test]),
        "mirrored": mirrored,
    }
    result = {
        "training_images": len(training),
        "test_images": len(test),
        "num_samples": cfg.num_samples,
        "sampling": sampling_of(cfg),
        "protocol": with_fingerprint(protocol),
        **opened.weights,
        "neighbours": {name: space.results() for name, space in spaces.items()},
        "fid": fid,
        "loss_by_level": losses,
    }
    write_json(folder / "report.json", result)
    plots.pairs(samples, training, spaces, cfg.pairs, folder / "pairs.png")
    plots.losses_by_level(losses, folder / "losses.png")
    show(result)
    say(f"Most suspicious samples and their nearest training images: {folder / 'pairs.png'}")
    say(f"Report and loss by noise level: {folder}")
    return result


def made(folder: Path) -> Path:
    """Creates the report's folder; raises UserError if it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)  # fail before an hour of sampling
    except OSError as error:
        raise UserError(f"output={folder} cannot be created ({error}); choose another") from error
    return folder


def compared(
    metrics: GenerativeMetrics,
    samples: Tensor,
    test: Tensor,
    training: Tensor,
    sides: tuple[Tensor, Tensor],
    mirrored: bool,
) -> tuple[dict[str, Neighbours], dict[str, float]]:
    """The neighbours of samples by features and pixels, and FID to training and test images.

    Images are uint8 (n, C, H, W). If `mirrored`, samples and test images are also compared as
    mirror images. `sides`, from `equal_sides`, are equally many images of each.
    """
    views = [[images, images.flip(-1)] if mirrored else [images] for images in (samples, test)]
    drawn = [metrics.extractor(view).cpu() for view in views[0]]
    beside = [stored_features(metrics, view, "test") for view in views[1]]
    known = stored_features(metrics, training, "training")
    ours, theirs = ([to_float(view).flatten(1) for view in each] for each in views)
    spaces = {
        metrics.extractor.name: Neighbours.of(drawn, beside, known, sides),
        "pixels": Neighbours.of(ours, theirs, to_float(training).flatten(1), sides),
    }
    return spaces, fid_gap(drawn[0], beside[0][sides[1]], known[sides[0]])


def stored_features(metrics: GenerativeMetrics, images: Tensor, name: str) -> Tensor:
    """The features (N, D) of images uint8 (N, C, H, W), computed once and then cached."""
    extractor, everything = metrics.extractor, torch.arange(len(images))
    key = {"images": hashing.of_tensors([images]), "extractor": extractor.fingerprint}
    split = RealImages(Split(images, everything), everything, name, name, metrics.cache_dir)

    def compute() -> dict[str, Tensor]:
        return {FEATURES: split.observe(Observer(extractor))[FEATURES]}

    return cached(metrics.cache_dir, f"{name}-{len(images)}-{extractor.name}", key, compute)[
        FEATURES
    ]


def fid_gap(generated: Tensor, test: Tensor, training: Tensor) -> dict[str, float]:
    """FID to training and to equally many test images; a gap above 0: nearer to training."""
    drawn = FeatureSet(generated)
    to_training, to_test = (frechet(drawn, FeatureSet(side)) for side in (training, test))
    return {
        "to_training": to_training,
        "to_test": to_test,
        "gap": to_test - to_training,
        "reference_images": len(training),
    }


@torch.inference_mode()
def loss_gap(opened: runs.DiffusionRun, batch_size: int) -> dict[str, dict[str, float]]:
    """The denoising loss by noise level, on equally many training and test images."""
    data, model, device = opened.datamodule, opened.model, opened.device
    tested = data.tested_on()
    count = min(len(tested.labels), len(data.train_labels()))
    sides = {"training": data.trained_on(count), "test": tested}
    means = {}
    for side, (images, labels) in sides.items():
        sums = torch.zeros(VALIDATION_LEVELS, 2)
        for ids in torch.arange(count).split(batch_size):
            x0 = model.first_stage.encode(images[ids].to(device))
            facts = (x0, labels[ids].to(device), ids.to(device))
            with opened.autocast:
                sums += losses_by_level(model.objective, model.denoiser, *facts).cpu()
        means[side] = sums[:, 0] / sums[:, 1]
    return {
        f"t{(index + 0.5) / VALIDATION_LEVELS:.2f}": {
            side: mean[index].item() for side, mean in means.items()
        }
        for index in range(min(VALIDATION_LEVELS, count))
    }


def show(result: dict) -> None:
    """Prints the main results: neighbours in each space, and the gap of FID."""
    for space, results in result["neighbours"].items():
        for name, value in results.items():
            say(f"{name} {value:.3g} in {space}: {MEANINGS[name]}")
    fid = result["fid"]
    say(
        f"FID to {fid['reference_images']} training images {fid['to_training']:.4g}, to equally "
        f"many test images {fid['to_test']:.4g}: a gap of {fid['gap']:.3g}"
    )
