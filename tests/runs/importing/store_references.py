"""Stores what small networks of the original authors' code answer, for test_references.py.

Give a folder with clones of the repositories, at the commits in NETWORKS:

    PYTHONPATH=tests python tests/runs/importing/store_references.py CLONES

Weights are drawn from numpy's frozen generator, so only their names and shapes are stored.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from helpers.reference_networks import FOLDER, drawn, images
from safetensors.torch import save_file

EDM = {"img_resolution": 16, "img_channels": 3, "sigma_data": 0.5}
EDM |= {"num_blocks": 1, "attn_resolutions": [8]}
SONG = {"model_type": "SongUNet", "model_channels": 16}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
TRANSFORMER = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
ADM = {"image_size": 16, "in_channels": 3, "attention_resolutions": [2]}
UPDOWN = {"resblock_updown": True, "use_scale_shift_norm": True}
EDM_CODE = ("edm", "008a4e5", "training.networks", "EDMPrecond")
ADM_CODE = ("guided-diffusion", "22e0df8", "guided_diffusion.unet", "UNetModel")
NETWORKS = {  # repository, commit, module, class, arguments
    "dit": ("DiT", "ed81ce2", "models", "DiT", TRANSFORMER),
    "sit": ("SiT", "947f95b", "models", "SiT", TRANSFORMER),
    "edm_ddpmpp": (
        *EDM_CODE,
        {**EDM, **SONG, "channel_mult": [1, 2], "label_dim": 5, "augment_dim": 9},
    ),
    "edm_ncsnpp": (
        *EDM_CODE,
        {**EDM, **SONG, **NCSNPP, "channel_mult": [1, 2, 3]},
    ),
    "edm_adm": (
        *EDM_CODE,
        {
            **EDM,
            "model_type": "DhariwalUNet",
            "model_channels": 64,
            "channel_mult": [1, 2],
            "label_dim": 5,
        },
    ),
    "edm2": (
        *("edm2", "4bf8162", "training.networks_edm2", "Precond"),
        {
            **EDM,
            "model_channels": 16,
            "channel_mult": [1, 2, 3],
            "channels_per_head": 16,
            "label_dim": 5,
            "use_fp16": False,
        },
    ),
    "adm": (
        *ADM_CODE,
        {
            **ADM,
            **UPDOWN,
            "model_channels": 32,
            "out_channels": 6,
            "num_res_blocks": 2,
            "channel_mult": [1, 3],
            "num_head_channels": 16,
            "num_classes": 5,
        },
    ),
    "adm_convolutions": (
        *ADM_CODE,
        {
            **ADM,
            "model_channels": 32,
            "out_channels": 3,
            "num_res_blocks": 1,
            "channel_mult": [1, 2],
            "num_heads": 4,
            "use_new_attention_order": True,
        },
    ),
    "adm_half": (
        *ADM_CODE,
        {
            **ADM,
            **UPDOWN,
            "model_channels": 64,
            "out_channels": 6,
            "num_res_blocks": 1,
            "channel_mult": [0.5, 1],
            "num_head_channels": 16,
            "num_classes": 5,
        },
    ),
}


LEVELS = {  # noise levels as the code of each takes them
    "dit": ("t", [0.0, 10.0, 500.0, 999.0]),
    "sit": ("t", [0.01, 0.3, 0.7, 1.0]),
    "edm": ("sigma", [0.002, 0.5, 3.0, 80.0]),
    "edm2": ("sigma", [0.002, 0.5, 3.0, 80.0]),
    "adm": ("t", [0.0, 10.0, 500.0, 999.0]),
}


@torch.no_grad()
def store(name: str, network: torch.nn.Module, commit: str, arguments: dict) -> None:
    """Stores a network's fixed tensors, the shapes of the others, and its inputs and outputs."""
    fixed = {
        key: value
        for key, value in network.state_dict().items()
        if key == "pos_embed" or key.endswith(("resample_filter", "freqs", "phases"))
    }
    shapes = {k: list(v.shape) for k, v in network.state_dict().items() if k not in fixed}
    network.load_state_dict(drawn(shapes) | fixed)
    network.eval()
    transformer = name in ("dit", "sit")
    what, levels = LEVELS[name.partition("_")[0]]
    io = {what: torch.tensor(levels)}
    shape = [len(levels), *((4, 8, 8) if transformer else (3, 16, 16))]
    x = images(shape, io.get("sigma"))
    if arguments.get("label_dim") or arguments.get("num_classes"):
        io["y"] = torch.tensor([0, 1, 4, 5] if transformer else [0, 1, 3, 4])
    labels = io.get("y")
    if "sigma" in io and labels is not None:
        labels = torch.nn.functional.one_hot(labels, 5).float()
        io["out_null"] = network(x, io["sigma"], torch.zeros_like(labels))
    io["out"] = network(x, io[what], labels).contiguous()
    tensors = {f"state/{k}": v for k, v in fixed.items()} | {f"io/{k}": v for k, v in io.items()}
    said = {"commit": commit, "arguments": arguments, "shapes": shapes, "images": shape}
    save_file(tensors, FOLDER / f"{name}.safetensors", {k: json.dumps(v) for k, v in said.items()})


def main(clones: Path) -> None:
    """Stores all networks, each in a process of its own, as their modules have the same names."""
    if len(sys.argv) > 2:
        repository, commit, module, kind, arguments = NETWORKS[sys.argv[2]]
        sys.path.insert(0, str(clones / repository))
        __import__(module)
        network = getattr(sys.modules[module], kind)(**arguments)
        store(sys.argv[2], network, f"{repository} {commit}", arguments)
        return
    for name in NETWORKS:
        subprocess.run([sys.executable, __file__, str(clones), name], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
