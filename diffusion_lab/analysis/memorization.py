"""Memorisation of a trained run: neighbours, FID and loss on training and test images."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.analysis import copy_controls, plots
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.common import hashing
from diffusion_lab.common.files import make_folder, write_json
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import PATH, numbers, optional, whole
from diffusion_lab.compute.distributed import of_all_ranks, on_rank_zero, own_batches
from diffusion_lab.data import ImageData, Split
from diffusion_lab.data.loader import LabelledRows
from diffusion_lab.families.diffusion.module import LEVELS, losses_by_level
from diffusion_lab.families.diffusion.run import DiffusionRun, open_diffusion_run
from diffusion_lab.metrics.distances import FeatureSet, frechet
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.neighbours import MEANINGS, Neighbours, equal_sides
from diffusion_lab.metrics.quantity import Protocol, with_fingerprint
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.opened import inherited, require_steps
from diffusion_lab.runs.results import sampling_of
from diffusion_lab.training.callbacks import sampling_seed

ABOVE_0 = numbers(
    "a list of numbers above 0", lambda value: all(0 < each < math.inf for each in value)
)
KEYS = {
    "num_samples": whole(2),
    "batch_size": whole(1),
    "pairs": whole(1),
    "seed": optional(whole(0)),
    "control": optional(PATH),
    "control_images": whole(1),
    "positive_at": optional(ABOVE_0.as_in([0.1, 0.3])),
}


def memorization(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Measures `cfg.run`, or with step=all each checkpoint; writes report.json and pictures."""
    check_keys(cfg, KEYS)
    if cfg.step == "all":
        return along_training(cfg, overrides)
    chosen = cfg.step is not None
    opened = open_diffusion_run(cfg)
    cfg = inherited(cfg, opened.saved, ("sampler", "guidance", "metrics"), overrides)
    if cfg.seed is None:
        cfg.seed = sampling_seed(opened.saved)
    pipeline, metrics, data = opened.pipeline(cfg), opened.metrics(cfg), opened.datamodule
    training, (fresh, sides) = data.train_images(), compared(data, opened.mirrored)
    test = data.test_images()[fresh]
    levels = copy_controls.levels_at(pipeline.schedule, cfg.positive_at or ())
    step = (cfg.step or checkpoints.step_of(cfg.run)) if chosen else None
    control = copy_controls.ControlRun.open(cfg, opened, step) if cfg.control else None
    folder = folder_of(cfg)
    on_rank_zero(lambda: make_folder(folder))  # fails before an hour of sampling
    samples = opened.draw_all(pipeline, cfg)
    spaces = copy_controls.CopySpaces(metrics, training, opened.mirrored)
    drawn, beside = spaces.views(samples), spaces.views(test, "test")
    neighbours = {
        name: Neighbours.of(drawn[name], beside[name], known, sides)
        for name, known in spaces.known.items()
    }
    features, beside_them = (each[metrics.extractor.name][0] for each in (drawn, beside))
    known = spaces.known[metrics.extractor.name]
    controls = copy_controls.copies_found(cfg, opened, pipeline, levels, spaces, neighbours)
    if control is not None:
        controls["negative"] = control.counted(cfg, spaces, drawn, beside)
    result: dict[str, Any] = {
        "training_images": len(training),
        "test_images": len(test),
        "test_images_left_out": len(data.test_images()) - len(test),
        "num_samples": cfg.num_samples,
        "sampling": sampling_of(cfg),
        "protocol": protocol_of(metrics, cfg.num_samples, data, opened.mirrored),
        **opened.weights,
        "neighbours": {name: space.results() for name, space in neighbours.items()},
        "fid": fid_gap(features, beside_them[sides[1]], known[sides[0]]),
        "loss_by_level": loss_gap(opened, cfg.batch_size),
        "controls": controls,
    }
    on_rank_zero(lambda: write_report(folder, result))
    pictured = samples, training, neighbours, cfg.pairs
    on_rank_zero(lambda: plots.pairs(*pictured, folder / "pairs.png"))
    on_rank_zero(lambda: plots.losses_by_level(result["loss_by_level"], folder / "losses.png"))
    show(result, folder)
    return result


def compared(data: ImageData, mirrored: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The places of the test images that are no training images, and `equal_sides` with those.

    Training images among them would put the limit of a copy at a distance of 0.
    """
    known, test = data.train_images(), data.test_images()
    if mirrored:
        known = torch.cat([known, known.flip(-1)])
    fresh = copy_controls.not_among(known, test)
    if left := int((~fresh).sum()):
        say(f"{left} of {len(test)} test images are training images, too, and are left out")
    places = fresh.nonzero().flatten()
    labels = data.train_labels(), data.test_labels()[places]
    sides = equal_sides(*map(data.classes_of, labels))
    if len(sides[0]) < 2:
        raise UserError("memorisation needs 2 training and 2 test images of the same classes")
    return places, sides


def folder_of(cfg: DictConfig) -> Path:
    folder = Path(cfg.run) / "memorization"  # comparisons read the last checkpoint's report in it
    if isinstance(cfg.step, int):
        folder /= f"step_{cfg.step:07d}"
    return Path(cfg.output or folder)


def along_training(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Measures every checkpoint of a run; the result is the newest one's, with `steps` of all."""
    require_steps(cfg)
    folder = folder_of(cfg)
    steps: dict[int, Any] = {}
    result: dict[str, object] = {}
    for step in checkpoints.kept(cfg.run):
        say(f"Checkpoint of step {step}")
        own = OmegaConf.merge(cfg, {"step": step, "output": str(folder / f"step_{step:07d}")})
        result = memorization(cast(DictConfig, own), overrides)
        steps[step] = result["neighbours"]
    result["steps"] = steps
    on_rank_zero(lambda: write_report(folder, result))
    on_rank_zero(lambda: plots.copies_along_training(steps, folder / "copies.png"))
    say(f"Copies along training: {folder / 'copies.png'}")
    return result


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """Writes the report, and deletes the pictures of the one before."""
    for name in ("pairs.png", "losses.png", "copies.png"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "report.json", result)


def protocol_of(
    metrics: GenerativeMetrics, num_samples: int, data: ImageData, mirrored: bool
) -> Protocol:
    """Everything but the training images that decides how copies are counted; not the controls."""
    return with_fingerprint(
        {
            "extractor": metrics.extractor.name,
            "extractor_fingerprint": metrics.extractor.fingerprint,
            "num_samples": num_samples,
            "test": hashing.of_tensors([data.test_images()]),
            "mirrored": mirrored,
        }
    )


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
def loss_gap(opened: DiffusionRun, batch_size: int) -> dict[str, dict[str, float]]:
    """The denoising loss by noise level, on equally many training and test images."""
    data, model, device = opened.datamodule, opened.model, opened.device
    tested = data.tested_on()
    count = min(len(tested.labels), len(data.train_labels()))
    sides: dict[str, Split | LabelledRows] = {"training": data.trained_on(count), "test": tested}
    means = {}
    for side, (images, labels) in sides.items():
        sums = torch.zeros(LEVELS, 2)
        for ids in own_batches(count, batch_size):
            x0 = model.first_stage.encode(images[ids].to(device))
            facts = (x0, labels[ids].to(device), torch.tensor(ids, device=device))
            with opened.autocast:
                sums += losses_by_level(model.loss, model.schedule, model.denoiser, *facts).cpu()
        means[side] = torch.div(*torch.stack(of_all_ranks(sums)).sum(0).unbind(1))
    return {
        f"t{(index + 0.5) / LEVELS:.2f}": {side: mean[index].item() for side, mean in means.items()}
        for index in range(min(LEVELS, count))
    }


def show(result: dict, folder: Path) -> None:
    """Prints the main results: neighbours in each space, the gap of FID, controls and files."""
    for space, results in result["neighbours"].items():
        for name, value in results.items():
            say(f"{name} {value:.3g} in {space}: {MEANINGS[name]}")
    fid = result["fid"]
    say(
        f"FID to {fid['reference_images']} training images {fid['to_training']:.4g}, to equally "
        f"many test images {fid['to_test']:.4g}: a gap of {fid['gap']:.3g}"
    )
    for line in copy_controls.lines(result["controls"]):
        say(line)
    say(f"Most suspicious samples and their nearest training images: {folder / 'pairs.png'}")
    say(f"Report and loss by noise level: {folder}")
