"""Imported networks answer like the original authors' code, for small networks of each kind."""

import os
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.reference_networks import Reference
from helpers.tiny_vae import save_vae
from safetensors.torch import save_file

from diffusion_lab import runs
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.noise import NoiseLevel

# larger networks of the same code, beside the repository, where there are any
SHARED = Path(os.environ.get("DIFFUSION_LAB_SHARED", ROOT.parent / "shared")) / "data"
LARGER = SHARED / "reference_nets"
KINDS = {
    "dit": ["kind=dit", "kind.heads=2"],
    "sit": ["kind=sit", "kind.heads=2"],
    "edm_ddpmpp": ["kind=edm"],
    "edm2": ["kind=edm2", "kind.head_channels=16"],
    "adm": ["kind=adm", "kind.head_channels=16"],
    "edm_ncsnpp": ["kind=edm"],
    "edm_adm": ["kind=edm"],
    "adm_convolutions": ["kind=adm", "kind.heads=4", "kind.new_attention_order=true"],
    "adm_half": ["kind=adm", "kind.head_channels=16"],
}
LARGER_KINDS = {
    "dit": ["kind=dit", "kind.heads=4"],
    "sit": ["kind=sit", "kind.heads=4"],
    "edm": ["kind=edm"],
    "edm2": ["kind=edm2", "kind.head_channels=16"],
    "adm": ["kind=adm", "kind.head_channels=16"],
}


@torch.no_grad()
def largest_difference(folder: Path, reference: Reference) -> float:
    """The largest difference between the outputs of an imported network and those stored."""
    _, model = runs.load(folder)
    denoiser, io = model.denoiser, reference.io
    labels = io.get("y")
    if "sigma" in io:
        sigma = io["sigma"].double()
        level = NoiseLevel(torch.zeros_like(sigma), torch.ones_like(sigma), sigma)
        labels = labels if labels is None or labels.ndim == 1 else labels.argmax(1)
        found = {"out": denoiser(io["x"], level, Given(labels)).x0}
        if "out_null" in io:
            found["out_null"] = denoiser(io["x"], level).x0
        return max((found[name] - io[name]).abs().max().item() for name in found)
    if "sit" in str(folder):
        level = model.schedule(1 - io["t"].double())
        velocity = denoiser(io["x"], level, Given(labels)).output  # of ours, from data to noise
        return (velocity + io["out"]).abs().max().item()
    level = model.schedule((io["t"].double() + 1) / 1000)
    estimate = denoiser(io["x"], level, Given(labels))
    outputs = [estimate.output]
    if estimate.log_variance_weight is not None:
        outputs.append(2 * estimate.log_variance_weight - 1)
    return (torch.cat(outputs, 1) - io["out"]).abs().max().item()


def imported(lab, folder: Path, reference: Reference, settings: list[str]) -> None:
    """Imports a network to `folder`, whose name says which one it is."""
    save_file(reference.state, "network.safetensors")
    if reference.io["x"].shape[1] == 4:  # latents
        settings = [*settings, f"first_stage.path={save_vae(Path('vae'))}"]
    lab.done("import", "network.safetensors", *settings, f"output={folder}")


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_a_network_answers_like_the_code_of_its_authors(lab, tmp_path, name):
    reference = Reference.stored(name)
    imported(lab, tmp_path / name, reference, KINDS[name])
    assert reference.io["out"].abs().max() > 0.1
    assert largest_difference(tmp_path / name, reference) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER_KINDS)
def test_a_larger_network_does_too(lab, tmp_path, name):
    if not LARGER.is_dir():
        pytest.skip(f"{LARGER} is not here")
    reference = Reference.whole(LARGER / f"{name}.safetensors")
    imported(lab, tmp_path / name, reference, LARGER_KINDS[name])
    assert largest_difference(tmp_path / name, reference) < 1e-5
