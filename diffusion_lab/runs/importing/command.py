"""The command `import`: a network of another program becomes a folder that opens like a run."""

from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.assembly.objects import build_images, build_model
from diffusion_lab.assembly.sentences import conf_dir, parse
from diffusion_lab.common import hashing
from diffusion_lab.common.formats import amount
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.data import ImageData
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.runs.export import require_new, write
from diffusion_lab.runs.folder import save_config
from diffusion_lab.runs.importing.kind import Imported, Kind
from diffusion_lab.runs.importing.kind.base import assigned

OWN_KEYS = ("kind", "paths", "output", "json")  # keys that are not of a run


def import_network(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Imports the network in the file `cfg.paths` to the new folder `cfg.output`; returns facts.

    The composition is the recipe of `cfg.kind`, then what the file says, then `overrides`.
    """
    output, files = Path(cfg.output), as_list(cfg.paths)
    require_new(output)
    if len(files) != 1:
        raise UserError("give one file: diffusion-lab import FILE kind=... output=...")
    kind: Kind = instantiate(cfg, "kind")
    network = read(kind, Path(files[0]))
    saved = configuration(kind, network, overrides)
    datamodule = build_images(saved)
    check_data(network, datamodule)
    model = build_model(saved, datamodule.image_shape, datamodule.labels, device="meta")
    check_fit(network, model.denoiser)
    OmegaConf.update(saved, "data.source", datamodule.source.facts())
    OmegaConf.update(saved, "first_stage", model.first_stage.facts())
    name = HydraConfig.get().runtime.choices["kind"]
    facts = {"imported": name, "file": network.file.name, "sha256": hashing.of_file(network.file)}
    write(output, network.tensors, facts, model.first_stage, lambda to: save_config(to, saved))
    count = sum(parameter.numel() for parameter in model.denoiser.parameters())
    say(f"Imported {network.file} with {amount(count)} parameters into {output}")
    return {"output": str(output), "tensors": len(network.tensors)} | facts


def read(kind: Kind, path: Path) -> Imported:
    """Reads a network; raises UserError for one that is not of this kind."""
    try:
        return kind.read(path)
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        # names that are those of the kind, on weights that are not
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is not a whole network of this kind ({reason}); write another kind"
        ) from error


def configuration(kind: Kind, network: Imported, overrides: list[str]) -> DictConfig:
    """The configuration of a run with this network."""
    facts = {"image_shape": list(network.image_shape), "num_classes": network.num_classes}
    unconditional = [] if network.num_classes else ["conditioning=none"]
    ours = [*kind.recipe, *network.overrides, *unconditional, *assigned("data.source", facts)]
    saved = compose("import", [*without_replaced(ours, overrides), *overrides])
    with open_dict(saved):
        for key in OWN_KEYS:
            del saved[key]
    return saved


def without_replaced(ours: list[str], given: list[str]) -> list[str]:
    """Our overrides, except those of groups for which the user gives another option."""
    groups = [key for each in parse(given) if (conf_dir() / (key := each.key_or_group)).is_dir()]

    def replaced(key: str) -> bool:
        return any(f"{key}.".startswith(f"{group}.".replace("/", ".")) for group in groups)

    keys = [each.key_or_group.replace("/", ".") for each in parse(ours)]
    return [text for text, key in zip(ours, keys, strict=True) if not replaced(key)]


def check_data(network: Imported, data: ImageData) -> None:
    """Raises UserError unless a network is for images of this size in these classes."""
    in_pixels = network.shape == network.image_shape
    if in_pixels and data.image_shape != network.image_shape:
        raise UserError(
            f"the network is for images of shape {network.image_shape}, but these data have "
            f"{data.image_shape}; choose data=... of that size, or leave data out"
        )
    if network.num_classes not in (0, data.num_classes):
        raise UserError(
            f"the network is for {network.num_classes} classes, but these data have "
            f"{data.num_classes}; choose data=... with as many, or leave data out"
        )


def check_fit(network: Imported, denoiser: Denoiser) -> None:
    """Raises UserError unless the weights are those of the denoiser."""
    if denoiser.image_shape != network.shape:
        raise UserError(
            f"the network diffuses {network.shape}, but here it would diffuse "
            f"{denoiser.image_shape}; choose data or a first_stage that make this the same"
        )
    own, given = denoiser.state_dict(), network.tensors
    for name in sorted(own.keys() | given.keys()):
        here, there = (tuple(each[name].shape) if name in each else None for each in (own, given))
        if here != there:
            raise UserError(
                f"{name} is {there or 'missing'} in the file and {here or 'missing'} in this "
                "composition; leave out what you have overridden, or write another kind"
            )
