"""Builds the data, the model and the pipeline of a configuration; shapes come from the data."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.config_keys import updated, verbatim
from diffusion_lab.assembly.families import require_diffusion
from diffusion_lab.assembly.instantiate import check_keys, class_of, errors_at, instantiate
from diffusion_lab.assembly.model import Drawable, Model
from diffusion_lab.assembly.pipeline import Pipeline
from diffusion_lab.backbone.base import checkpoint_activations
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import flag
from diffusion_lab.data import ImageData
from diffusion_lab.data.augmentation import NonLeaky, check_augmentation
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.objective import Loss, TeacherModel, TeacherPairs
from diffusion_lab.diffusion.objective.loss import Recorded
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.metrics.extractor import Classifier

# deviation of Fourier frequencies, in cycles per unit of a noise label: EDM2's, or 2.5 per range
BANDWIDTHS = {"log_sigma": 1.0, "data_time": 2.5, "time": 0.0025, "index": 0.0025}
NCSNPP = 16.0  # times as wide: the frequencies of NCSN++


def build_images(cfg: DictConfig) -> ImageData:
    """Builds the image data of a configuration; no image is read yet."""
    fits = issubclass(class_of(cfg, "data") or ImageData, ImageData)  # else arguments may not fit
    datamodule = instantiate(cfg, "data") if fits else None
    if not isinstance(datamodule, ImageData):
        raise wrong_data(cfg)
    with errors_at(cfg, "data.source"):
        _ = datamodule.image_shape, datamodule.labels  # inferred here: errors name keys
    return datamodule


def wrong_data(cfg: DictConfig) -> UserError:
    """The error for a class of data that cannot be trained on."""
    return UserError(
        f"data._target_={cfg.data.get('_target_')} does not inherit from "
        "diffusion_lab.data.ImageDataModule; let it, or write data=images and a class of your own "
        "as data.source"
    )


def read_data(cfg: DictConfig, datamodule: ImageData) -> None:
    """Reads the images of a data module built from `cfg`; a UserError names the full key."""
    load_data(cfg, datamodule)
    with errors_at(cfg, "data.source"):
        datamodule.source.check_labels(datamodule.reference_labels())


def facts_of_data(cfg: DictConfig, datamodule: ImageData) -> dict[str, object]:
    """Entries that a run's data determine; raises UserError if it has begun with other data."""
    sha256 = datamodule.fingerprint
    if cfg.get("data_sha256") not in (None, sha256):
        raise UserError(
            "the images or labels are not those with which this run began: their sha256 begins "
            f"with {sha256[:12]}, not with {cfg.data_sha256[:12]}; restore them, or begin a new run"
        )
    return {"data.source": verbatim(datamodule.source.facts()), "data_sha256": sha256}


def load_data(cfg: DictConfig, datamodule: ImageData) -> None:
    """Reads the images, whatever their labels are; a UserError names the full key."""
    with errors_at(cfg, "data.source"):
        datamodule.prepare_data()
        datamodule.check_splits()  # reads both
    with errors_at(cfg, "data"):
        datamodule.setup("fit")


def build_model(
    cfg: DictConfig, image_shape: tuple[int, int, int], labels: Labels, device: str = "cpu"
) -> Model:
    """Builds the model for images of `image_shape`; raises UserError if it cannot work.

    On the device "meta" the denoiser takes neither time nor memory.
    """
    cfg, drawing = begun(cfg, image_shape)
    coupling = instantiate(cfg, "coupling")
    objective = instantiate(cfg, "objective")(schedule=drawing["schedule"], coupling=coupling)
    drawing |= {
        "loss": objective.loss,
        "label_dropout": objective.label_dropout,
        "paired": coupling is not None or draws_pairs(objective.teacher),
    }
    check_augmentation(drawing["augmentation"], image_shape)
    training = {
        "offset_noise": objective.offset_noise,
        "coupling": coupling,
        "compiled": cfg.compile,
        "recomputed": cfg.activation_checkpointing,
        "aligned": bool(cfg.get("alignment")),
    }
    parts = vars(objective.parts()) | drawing | training
    denoiser = build_denoiser(cfg, parts, labels, device)
    return Model(denoiser=denoiser, objective=objective, **drawing)


def build_drawable(cfg: DictConfig, image_shape: tuple[int, int, int], labels: Labels) -> Drawable:
    """Builds what a trained model draws with, without the parts that only train it."""
    cfg, drawing = begun(cfg, image_shape)
    drawing |= {
        "loss": known_loss(cfg),
        "label_dropout": cfg.objective.label_dropout,
        "paired": cfg.get("coupling") is not None
        or draws_pairs(instantiate(cfg, "objective.teacher")),
    }
    parts = drawing | {"prediction": instantiate(cfg, "objective.prediction")}
    return Drawable(denoiser=build_denoiser(cfg, parts, labels), **drawing)


def draws_pairs(teacher: TeacherModel | TeacherPairs | None) -> bool:
    """Whether a teacher draws what is trained on, so that noise and images depend on another."""
    return teacher is not None and not teacher.asked


def begun(cfg: DictConfig, image_shape: tuple[int, int, int]) -> tuple[DictConfig, dict[str, Any]]:
    """A configuration with the std of its first stage, and parts that it builds for any use."""
    require_diffusion(cfg)
    schedule = instantiate(cfg, "schedule")
    first_stage = instantiate(cfg, "first_stage")(image_shape=image_shape)
    cfg = with_data_std(cfg, first_stage.data_std)
    augmentation = instantiate(cfg, "augmentation")
    return cfg, {"schedule": schedule, "first_stage": first_stage, "augmentation": augmentation}


def known_loss(cfg: DictConfig) -> Loss:
    """The loss of a trained model, or its recorded facts if its class is no longer there."""
    try:
        return instantiate(cfg, "objective.loss")
    except UserError:
        if not cfg.get("loss_facts"):
            raise
        return Recorded(**cfg.loss_facts)


def build_denoiser(
    cfg: DictConfig, parts: dict[str, Any], labels: Labels, device: str = "cpu"
) -> Denoiser:
    """Builds the denoiser; raises UserError if it and the other parts cannot be combined."""
    schedule, first_stage, loss = parts["schedule"], parts["first_stage"], parts["loss"]
    label, std, clip = cfg.denoiser.noise_label, cfg.denoiser.input_std, cfg.denoiser.clip
    if label == "auto":
        label = noise_label(schedule, loss.differentiates_time)
    if std == "auto":
        std = first_stage.data_std if schedule.explodes else None
    cfg = with_bandwidths(cfg, label)
    previous, augmentation = cfg.denoiser.self_conditioning, parts["augmentation"]
    shape = first_stage.latent_shape
    rules.check(**parts, noise_label=label, clip=clip, self_conditioning=previous, shape=shape)
    with torch.device(device), errors_at(cfg, "denoiser"):
        denoiser = Denoiser(
            backbone=instantiate(cfg, "backbone"),
            conditioning=instantiate(cfg, "conditioning"),
            prediction=parts["prediction"],
            image_shape=shape,
            labels=labels,
            noise_label=label,
            input_std=std,
            self_conditioning=previous,
            clip=clip,
            learned_variance=bool(loss.variance),
            augmentation_labels=augmentation.values if isinstance(augmentation, NonLeaky) else 0,
            jumps=loss.two_levels,
            told_scale=loss.told_scale,
        )
    rules.check(
        **{key: parts[key] for key in ("loss", "coupling", "compiled") if key in parts},
        backbone=denoiser.backbone,
        conditioning=denoiser.conditioning,
        conditional=denoiser.conditioning.conditional,
        described=denoiser.augmentation is not None,
    )
    check_keys(cfg, {"activation_checkpointing": flag()})
    if cfg.activation_checkpointing:
        with errors_at(cfg, ""):
            checkpoint_activations(denoiser.backbone)
    return denoiser


def with_bandwidths(cfg: DictConfig, label: str) -> DictConfig:
    """A configuration whose random frequencies have, if `auto`, the width of a noise label."""
    width, networks = BANDWIDTHS.get(label, 1.0), ("backbone", "backbone.network")
    widths = {f"{network}.bandwidth": width for network in networks}
    return with_automatic(
        cfg, widths | {f"{each}.embedding.std": NCSNPP * width for each in networks}
    )


def noise_label(schedule: NoiseSchedule, differentiated: bool) -> str:
    """The noise label that suits the schedule, and a derivative by the time if one is taken."""
    if schedule.explodes:
        return "log_sigma"
    if schedule.discrete_steps is not None:
        return "index"
    # a derivative with respect to t would be a thousand times that of the network
    return "data_time" if differentiated else "time"


def with_data_std(cfg: DictConfig, std: float) -> DictConfig:
    """A configuration in which each data_std=auto of its objective is `std`."""
    parts = ("objective.prediction", "objective.loss.weighting")
    return with_automatic(cfg, {f"{part}.data_std": std for part in parts})


def with_automatic(cfg: DictConfig, values: dict[str, float]) -> DictConfig:
    """The configuration, or a copy with these values for those of their keys that are `auto`."""
    found = {}
    for key, value in values.items():
        place, _, name = key.rpartition(".")
        part = OmegaConf.select(cfg, place)  # of one's own class it may be anything
        if isinstance(part, DictConfig) and part.get(name) == "auto":
            found[key] = value
    return updated(cfg, found) if found else cfg


def build_pipeline(
    cfg: DictConfig,
    model: Drawable,
    kind: Labels,
    weak: Denoiser | None = None,
    classifier: Classifier | None = None,
) -> Pipeline:
    """Builds the sampling call; `weak` and `classifier` are those of `cfg.guidance`."""
    require_diffusion(cfg)
    sampler, guidance = instantiate(cfg, "sampler"), instantiate(cfg, "guidance")
    asked = model.denoiser if guidance.uses_strong or weak is None else weak
    rules.check(
        sampler=sampler,
        guidance=guidance,
        asked=asked,
        schedule=model.schedule,
        loss=model.loss,
        first_stage=model.first_stage,
        conditional=model.denoiser.conditioning.conditional,
        label_dropout=model.label_dropout,
    )
    with errors_at(cfg, "sampler"):
        sampler.levels(model.schedule)  # raises if they do not fit
    rules.check(sampler=sampler, schedule=model.schedule, paired=model.paired)
    drawing = model.denoiser, model.schedule, sampler, guidance, model.first_stage
    return Pipeline(*drawing, kind, weak, classifier)
