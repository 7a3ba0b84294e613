"""Builds the data, the model and the pipeline of a configuration; shapes come from the data."""

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.backbone import Energy
from diffusion_lab.backbone.base import checkpoint_activations
from diffusion_lab.backbone.conditioning import RawLabels
from diffusion_lab.build.config_keys import verbatim
from diffusion_lab.build.families import require_diffusion
from diffusion_lab.build.instantiate import check_keys, errors_at, instantiate
from diffusion_lab.build.losses import check_derivative, check_losses
from diffusion_lab.build.model import Model, check_first_stage, check_training
from diffusion_lab.build.sampling import check_noise, check_sampling
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import flag
from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.augmentation import NonLeaky, check_augmentation
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.objective import Objective
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.pipeline import Pipeline

# deviation of Fourier frequencies, in cycles per unit of a noise label: EDM2's, or 2.5 per range
BANDWIDTHS = {"log_sigma": 1.0, "data_time": 2.5, "time": 0.0025, "index": 0.0025}
NCSNPP = 16.0  # times as wide: the frequencies of NCSN++


def build_datamodule(cfg: DictConfig) -> ImageDataModule:
    """Builds the data module of a configuration; no image is read yet."""
    datamodule = instantiate(cfg, "data")
    with errors_at(cfg, "data.source"):
        _ = datamodule.image_shape, datamodule.labels  # inferred here: errors name keys
    return datamodule


def read_data(cfg: DictConfig, datamodule: ImageDataModule) -> None:
    """Reads the images of a data module built from `cfg`; a UserError names the full key."""
    load_data(cfg, datamodule)
    with errors_at(cfg, "data.source"):
        datamodule.source.check_labels(datamodule.reference_labels())


def facts_of_data(cfg: DictConfig, datamodule: ImageDataModule) -> dict[str, object]:
    """Entries of a training's configuration that its data determine.

    Raises UserError if the run has begun with other data.
    """
    sha256 = datamodule.fingerprint
    if cfg.get("data_sha256") not in (None, sha256):
        raise UserError(
            "the images or labels are not those with which this run began: their sha256 begins "
            f"with {sha256[:12]}, not with {cfg.data_sha256[:12]}; restore them, or begin a new run"
        )
    return {"data.source": verbatim(datamodule.source.facts()), "data_sha256": sha256}


def load_data(cfg: DictConfig, datamodule: ImageDataModule) -> None:
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
    require_diffusion(cfg)
    schedule = instantiate(cfg, "schedule")
    first_stage = instantiate(cfg, "first_stage")(image_shape=image_shape)
    cfg = with_data_std(cfg, first_stage.data_std)
    coupling = instantiate(cfg, "coupling")
    objective = instantiate(cfg, "objective")(schedule=schedule, coupling=coupling)
    check_losses(objective, cfg.denoiser, first_stage.latent_shape)
    augmentation = instantiate(cfg, "augmentation")
    label, std, clip = cfg.denoiser.noise_label, cfg.denoiser.input_std, cfg.denoiser.clip
    if label == "auto":
        jumps = objective.jump_loss
        label = noise_label(schedule, differentiated=bool(jumps and jumps.forward_mode))
    if std == "auto":
        std = first_stage.data_std if schedule.explodes else None
    fit_bandwidths(cfg.backbone, label)
    check_training(schedule, objective, label)
    check_derivative(objective, cfg.compile, cfg.activation_checkpointing)
    check_augmentation(augmentation, image_shape)
    check_first_stage(first_stage, augmentation, clip)
    with torch.device(device), errors_at(cfg, "denoiser"):
        denoiser = Denoiser(
            backbone=instantiate(cfg, "backbone"),
            conditioning=instantiate(cfg, "conditioning"),
            prediction=objective.prediction,
            image_shape=first_stage.latent_shape,
            labels=labels,
            noise_label=label,
            input_std=std,
            self_conditioning=cfg.denoiser.self_conditioning,
            clip=clip,
            learned_variance=objective.variance_loss is not None,
            augmentation_labels=augmentation.values if isinstance(augmentation, NonLeaky) else 0,
            jumps=objective.jumps,
        )
    check_denoiser(objective, denoiser, compiled=cfg.compile is True)
    check_keys(cfg, {"activation_checkpointing": flag()})
    if cfg.activation_checkpointing:
        with errors_at(cfg, ""):
            checkpoint_activations(denoiser.backbone)
    return Model(denoiser, schedule, objective, first_stage, augmentation)


def fit_bandwidths(backbone: DictConfig, label: str) -> None:
    """Gives random frequencies that are `auto` the deviation that suits a noise label."""
    width = BANDWIDTHS.get(label, 1.0)
    for network in filter(None, (backbone, backbone.get("network"))):
        if network.get("bandwidth") == "auto":
            network.bandwidth = width
        if OmegaConf.select(network, "embedding.std") == "auto":
            network.embedding.std = NCSNPP * width


def noise_label(schedule: NoiseSchedule, differentiated: bool) -> str:
    """The way of passing the noise level to a network that suits the schedule.

    `differentiated` is whether a jump's derivative with respect to the time is taken.
    """
    if schedule.explodes:
        return "log_sigma"
    if schedule.discrete_steps is not None:
        return "index"
    # a derivative with respect to t would be a thousand times that of the network
    return "data_time" if differentiated else "time"


def check_denoiser(objective: Objective, denoiser: Denoiser, compiled: bool) -> None:
    """Raises UserError if the objective or a compiler cannot work with the denoiser's parts."""
    check_labels(denoiser)
    heard = denoiser.conditioning
    if heard.conditional and not heard.labels.classes and objective.coupling is not None:
        raise UserError(
            "a coupling would give the images of a label noise of their own, and only classes keep "
            "theirs apart; write coupling=none, or conditioning=none"
        )
    inner = getattr(objective.jump_loss, "guidance", 1)
    if inner != 1 and not denoiser.conditioning.conditional:
        raise UserError(
            f"objective.jump_loss.guidance={inner} needs labels; write "
            "objective.jump_loss.guidance=1, or train with conditioning=class_label"
        )
    if isinstance(denoiser.backbone, Energy) and compiled:
        raise UserError(
            "backbone=energy is a derivative of its network, which a compiled one does not have; "
            "write compile=auto"
        )


def check_labels(denoiser: Denoiser) -> None:
    """Raises UserError if labels would not reach the network in the form that it takes."""
    embeds = getattr(denoiser.backbone, "embeds_labels", False)
    raw = isinstance(denoiser.conditioning, RawLabels)
    if raw and not embeds:
        raise UserError(
            "conditioning=raw_labels is for networks that embed labels themselves, such as "
            "backbone=diffusers_model, and this one does not; write conditioning=class_label"
        )
    if embeds and denoiser.conditioning.conditional and not raw:
        raise UserError(
            "this network embeds labels itself; write conditioning=raw_labels, or conditioning=none"
        )
    if embeds and denoiser.augmentation is not None:
        raise UserError(
            "this network cannot be told how an image was augmented; write augmentation=none"
        )


def with_data_std(cfg: DictConfig, std: float) -> DictConfig:
    """A copy of a configuration in which each data_std=auto of its objective is `std`."""
    cfg = cfg.copy()
    for part in (cfg.objective.get("prediction"), cfg.objective.get("weighting")):
        if isinstance(part, DictConfig) and part.get("data_std") == "auto":
            part.data_std = std
    return cfg


def build_pipeline(
    cfg: DictConfig,
    model: Model,
    kind: Labels,
    weak: Denoiser | None = None,
    classifier: Classifier | None = None,
) -> Pipeline:
    """Builds the sampling call of `cfg`.

    `weak` is the denoiser of `cfg.guidance.weak_run`, `classifier` that of `cfg.guidance`.
    """
    require_diffusion(cfg)
    sampler, guidance = instantiate(cfg, "sampler"), instantiate(cfg, "guidance")
    check_sampling(model, sampler, guidance)
    with errors_at(cfg, "sampler"):
        sampler.levels(model.schedule)  # raises if they do not fit
    check_noise(model, sampler)
    return Pipeline(
        model.denoiser,
        model.schedule,
        sampler,
        guidance,
        model.first_stage,
        kind,
        weak,
        classifier,
    )
