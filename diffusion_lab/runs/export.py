"""Exports a trained model as a folder to share: weights, configuration, first stage; no pickle.

Or, with format=diffusers, as parts of diffusers.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.assembly.families import DIFFUSION, family_of
from diffusion_lab.assembly.instantiate import check_keys, errors_at
from diffusion_lab.common.files import replacing_folder, write_atomically
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import one_of, optional
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.runs import weights
from diffusion_lab.runs.current import EXPORTED
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.opened import NetworkRun, kind_of, load_trained_config, weights_choice
from diffusion_lab.runs.to_diffusers.folder import CARD, card_of, convert

FORMATS = ("run", "diffusers")
HALVES = ("float16", "bfloat16")


def export(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Writes the model of the run `cfg.run` to the new folder `cfg.output`; returns a summary.

    `sample`, `evaluate` and all other commands except `train` accept the folder as a run, unless
    `cfg.format` is diffusers. It is written atomically. Raises UserError if the run cannot be
    exported.
    """
    output = Path(cfg.output)
    if cfg.format not in FORMATS:
        raise UserError(f"format={cfg.format} must be one of {', '.join(FORMATS)}")
    require_new(output)
    run = Path(cfg.run)
    saved = load_trained_config(run)
    kind = kind_of(saved)
    if not issubclass(kind, NetworkRun):
        raise UserError(f"{run} is an autoencoder; share its {saving.FIRST_STAGE_FILE} instead")
    if cfg.format == "diffusers" and family_of(saved) != DIFFUSION:
        raise UserError(
            f"format=diffusers is for diffusion models, and {run} is {kind.limits}; write "
            "format=run"
        )
    check_keys(cfg, {"dtype": optional(one_of(*HALVES))})
    tensors, facts = weights.load_weights(weights_choice(cfg))
    if cfg.dtype is not None and cfg.format != "run":
        raise UserError(f"dtype={cfg.dtype} is for format=run; leave it out")
    if cfg.dtype is not None:
        shorter = {name for name, value in tensors.items() if value.is_floating_point()}
        tensors |= {name: tensors[name].to(getattr(torch, cfg.dtype)) for name in shorter}
    fields = kind.with_weights(run, saved, tensors)  # weights of another model are refused here
    if cfg.format == "diffusers":
        with errors_at(cfg, ""):
            parts = convert(fields["model"], saved, fields["datamodule"].num_classes)
        card = card_of(run, saved, facts, parts)
        with replacing_folder(output) as folder:
            parts.save(folder)
            write_atomically(folder / CARD, card)
    else:
        write(output, tensors, facts, fields["first_stage"], partial(shutil.copy, run / CONFIG))
    say(f"Exported {len(tensors)} tensors to {output}")
    return {"output": str(output), "tensors": len(tensors)} | facts


def require_new(output: Path) -> None:
    """Raises UserError if there already is something at `output`."""
    if output.exists():
        raise UserError(f"output={output} already exists; choose a new folder")


def write(
    output: Path,
    tensors: dict[str, Tensor],
    facts: dict[str, str],
    first_stage: FirstStage | None,
    write_config: Callable[[Path], object],
) -> None:
    """Writes the new folder `output` atomically; raises UserError if that fails.

    `facts` are kept beside the tensors, and `write_config` writes the configuration into a folder.
    """
    with replacing_folder(output) as folder:
        # safetensors refuses tensors that share memory
        copies = {
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        safetensors.torch.save_file(copies, folder / EXPORTED, {"format": "pt"} | facts)
        write_config(folder)
        if first_stage is not None:
            first_stage.copy_into(folder)
