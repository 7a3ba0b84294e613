"""The command `average`: averages of a run's weights, of any length, made from its snapshots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.assembly.families import AUTOENCODER, family_of
from diffusion_lab.assembly.instantiate import check_keys, errors_at, instantiate
from diffusion_lab.assembly.objects import build_images, read_data
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import amount
from diffusion_lab.common.messages import UserError, say, track
from diffusion_lab.common.ranges import either, number, numbers, optional, whole
from diffusion_lab.compute.device import pick_device
from diffusion_lab.diffusion.power_average import LONGEST, coefficients, gamma_of
from diffusion_lab.families.autoencoder.task import latent_moments
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.metrics.generative import PreparedMetrics
from diffusion_lab.runs import averages, weights
from diffusion_lab.runs.averages import name_of
from diffusion_lab.runs.current import EXPORTED
from diffusion_lab.runs.opened import load_trained_config, move_data
from diffusion_lab.training.callbacks.evaluation import reconstruction_metrics


def first_stages_of(
    cfg: DictConfig, saved: DictConfig
) -> Callable[[dict[str, Tensor], Path], dict[str, float]]:
    """The function that writes the autoencoder of the run `cfg.run` with other weights to a folder.

    It returns the metrics that it measures: rFID and its companions, if the run measured them.
    Raises UserError if the run has not ended yet, as its first stage says what the autoencoder is.
    """
    with errors_at(saved, ""):
        path = Path(cfg.run) / saving.FIRST_STAGE_FILE
        autoencoder, known, _ = saving.load_autoencoder(path)
    if cfg.data_root:
        move_data(saved.data.source, cfg.data_root)
    data, device, prepared = build_images(saved), pick_device(cfg.device), None
    read_data(saved, data)
    if any(name.startswith("rfid") for name in known.metrics):
        metrics = instantiate(saved, "metrics")
        with errors_at(saved, "metrics"):
            metrics.load(data, device)
            prepared = PreparedMetrics.of(metrics, data)

    def save(tensors: dict[str, Tensor], folder: Path) -> dict[str, float]:
        autoencoder.load_state_dict(tensors)
        mean, std = latent_moments(autoencoder, data, device)
        results = {}
        if prepared:
            results = reconstruction_metrics(autoencoder, data, prepared, cfg.batch_size)
        facts = replace(known, latent_mean=mean, latent_std=std, metrics=results)
        saving.save_autoencoder(autoencoder, facts, folder / saving.FIRST_STAGE_FILE)
        return results

    return save


LENGTH = either(
    number(f"above 0 and at most {LONGEST:.3f}", lambda value: 0 < value <= LONGEST).as_in(0.1),
    numbers(
        "a list of them", lambda value: bool(value) and 0 < min(value) <= max(value) <= LONGEST
    ),
)
KEYS = {"length": LENGTH, "step": optional(whole(1)), "batch_size": whole(1)}


def average(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Makes the average of each of `cfg.length` of the run `cfg.run`; returns where they are.

    An autoencoder's is a first stage, with its latents measured again. Raises UserError if the run
    has no snapshots, or none of `cfg.step`.
    """
    check_keys(cfg, KEYS)
    run, saved = Path(cfg.run), load_trained_config(cfg.run)
    step, last, found = chosen(run, cfg.step)
    save = first_stages_of(cfg, saved) if family_of(saved) == AUTOENCODER else None
    made = []
    for length, (tensors, error) in reconstruct(found, step, as_list(cfg.length)).items():
        folder = averages.folder_of(run, length, step)
        facts = {"length": name_of(length), "step": str(step), "run": run.resolve().name}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if save:
                measured = save(tensors, folder)
            else:
                content = safetensors.torch.save(tensors, {"format": "pt"} | facts)
                write_atomically(folder / EXPORTED, content)
                measured = {}
        except OSError as reason:
            raise UserError(
                f"{folder} cannot be written ({reason.strerror}); make room, and try again"
            ) from reason
        name = name_of(length) if step == last else folder.name
        size = sum(path.stat().st_size for path in folder.iterdir())
        made.append({"average": name, "folder": str(folder), "profile_error": error} | measured)
        say(
            f"Length {name_of(length)}: {amount(size)}B in {folder}, its profile off by {error:.1%}"
            + "".join(f", {key} {value:.4g}" for key, value in measured.items() if "rfid/" in key)
        )
    return {"step": step, "snapshots": len(found), "averages": made}


def chosen(
    run: Path, asked: int | None
) -> tuple[int, int, dict[int, Callable[[], weights.Tensors]]]:
    """The step asked for, or the last one; the last one; and the snapshots up to the step."""
    if (run / EXPORTED).is_file():
        raise UserError(f"{run} is an export, which has no snapshots; give the run that it is of")
    last, found = weights.snapshots_of(run)
    if not found:
        raise UserError(
            f"{run} has no snapshots to make an average of; train a run with "
            "callbacks.posthoc_ema.snapshots=32"
        )
    step = last if asked is None else asked
    if step not in found:
        nearest = sorted(sorted(found, key=lambda other: abs(other - step))[:4])
        raise UserError(
            f"step={step} of {run} has no snapshot; write one that has, as "
            f"{', '.join(f'step={other}' for other in nearest)}"
        )
    return step, last, {other: read for other, read in found.items() if other <= step}


def reconstruct(
    found: Mapping[int, Callable[[], weights.Tensors]], step: int, lengths: Sequence[float]
) -> dict[float, tuple[weights.Tensors, float]]:
    """The averages of these lengths at a step of `found`, and the error of their profiles."""
    known = [gamma_of(length) for length in weights.LENGTHS]
    times = [float(other) for other in found for _ in known]
    fits = {
        length: coefficients(times, known * len(found), step, gamma_of(length))
        for length in lengths
    }
    sums: dict[float, dict[str, Tensor]] = {length: {} for length in lengths}
    buffers = {}
    for place, other in enumerate(track(list(found), "Reading snapshots")):
        for key, value in found[other]().items():
            part, _, name = key.partition("/")
            if part == weights.BUFFERS:
                buffers[name] = value  # those of the last snapshot stay
                continue
            row = place * len(known) + weights.LENGTHS.index(float(part))
            for length, (factors, _) in fits.items():
                total = sums[length].setdefault(name, torch.zeros(value.shape))
                total.add_(value.float(), alpha=factors[row].item())
    return {length: (sums[length] | buffers, fits[length][1]) for length in lengths}
