"""Writes run folders without training: what `compare` reads of a run, with chosen metrics."""

import json
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab.metrics.quantity import with_fingerprint
from diffusion_lab.report.comparison import Report
from diffusion_lab.report.frame import collect
from diffusion_lab.runs import published
from diffusion_lab.runs.folder import save_config
from diffusion_lab.runs.results import sampling_of

NAME = "efficientnet_lite0-96/train10k-1k"
PROTOCOL = {
    "extractor": "efficientnet_lite0-96",
    "extractor_fingerprint": "abc",
    "data": "0123",
    "reference": "train",
    "reference_images": 10_000,
    "num_samples": 1000,
}
STUDY_PROTOCOL = {
    "question": "Is DiT better than a U-Net?",
    "metric": "fid",
    "test": "paired",
    "seeds": [0, 1, 2],
    "stop": "after three seeds",
}
SAMPLER = {"_target_": "diffusion_lab.diffusion.sampler.DPMSolver", "steps": 10}
GUIDANCE = {"_target_": "diffusion_lab.diffusion.guidance.Guidance", "scale": 1.0}
CALLBACKS = "diffusion_lab.training.callbacks"
STEPS = 100
UNET = {"backbone": {"_target_": "diffusion_lab.backbone.UNet"}}


def fake_run(
    folder: Path,
    fid: float,
    seed: int = 0,
    config: dict | None = None,
    summary: dict | None = None,
    metrics: dict | None = None,
    protocol: dict | None = None,
) -> Path:
    """Writes a finished run of 100 steps of 64 images with the final FID `fid`.

    The other arguments add to its configuration, summary, metrics and protocol.
    """
    base = {
        "data": {
            "_target_": "diffusion_lab.data.ImageData",
            "source": {"_target_": "diffusion_lab.data.source.FashionMNIST", "root": "data"},
        },
        "backbone": {"_target_": "diffusion_lab.backbone.DiT", "width": 32},
        "objective": {"_target_": "diffusion_lab.diffusion.objective.Objective"},
        "sampler": SAMPLER,
        "guidance": GUIDANCE,
        "callbacks": {
            "evaluation": {"_target_": f"{CALLBACKS}.SampleEvaluation", "seed": 0},
            "sample_grid": {"_target_": f"{CALLBACKS}.SampleGrid", "seed": 0, "columns": 3},
        },
        "name": "x",
        "seed": seed,
        "run_dir": str(folder),
    }
    for part in ("checkpoints", "samples"):
        (folder / part).mkdir(parents=True)
    whole = OmegaConf.merge(base, config or {})
    save_config(folder, whole)
    checkpoint = {"state_dict": {}, "global_step": STEPS, "folder": str(folder)}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    results = {f"fid/{NAME}": fid, f"fid_std/{NAME}": 3.0, f"fid_real/{NAME}": 96.3}
    results |= {"val/loss": 0.2 + fid / 1e4, "test/loss": 0.21 + fid / 1e4} | (metrics or {})
    rows = [
        {
            "step": step,
            f"fid/{NAME}": 2 * fid - fid * step / STEPS,
            "train/images_per_second": 300.0 + step,
            "images": 64 * step,
            "seconds": float(step),
        }
        for step in (50, STEPS)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "finished": True,
        "steps": STEPS,
        "images_seen": 64 * STEPS,
        "wall_seconds": 150.0,
        "training_seconds": 120.0,
        "parameters": 1_000_000,
        "training_images": 60_000,
        "macs": 2_000_000,
        "peak_memory_bytes": 2**30,
        "metrics": results,
        "protocol": with_fingerprint(PROTOCOL | (protocol or {})),
        "sampling": sampling_of(whole) | {"seed": whole.callbacks.evaluation.seed},
        "device": "cpu",
        "versions": {"torch": "2"},
        "ended_at": "2026-01-01T00:00:00+00:00",
    }
    (folder / "summary.json").write_text(json.dumps(facts | (summary or {})))
    draw_grid(folder / "samples" / f"step_{STEPS:07d}.png", seed)
    return folder


def draw_grid(path: Path, seed: int, side: int = 8, classes: int = 4, columns: int = 3) -> None:
    """Draws a grid as runs do: one row per class, gaps of 2 white pixels, enlarged twice."""
    pitch = side + 2
    pixels = np.full((classes * pitch + 2, columns * pitch + 2), 255, np.uint8)
    noise = np.random.default_rng(seed).integers(0, 200, (classes, columns, side, side))
    for row in range(classes):
        for column in range(columns):
            place = pixels[2 + row * pitch :, 2 + column * pitch :]
            place[:side, :side] = noise[row, column]
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(path)


def fake_group(root: Path, name: str, fids: list[float], **more) -> list[Path]:
    """Writes a run for each FID, with seeds 0, 1, ..."""
    return [fake_run(root / f"{name}_{seed}", fid, seed, **more) for seed, fid in enumerate(fids)]


def said(runs, kind="fid"):
    """The words of a comparison of a folder of runs: the answer by a metric, and all sentences."""
    report = Report(collect([runs]))
    return report.answers.get(kind), " ".join(report.sentences)


def fake_images(folder: Path, fid: float, seed: int = 0, name: str = "theirs") -> Path:
    """Writes the folder that `evaluate images=...` writes, with the FID `fid`."""
    data = {"source": {"_target_": "diffusion_lab.data.source.FashionMNIST", "root": "data"}}
    config = {"name": name, "seed": seed, "images": "theirs.npz", "data": data, "callbacks": {}}
    (folder / "evaluations").mkdir(parents=True)
    save_config(folder, OmegaConf.create(config))
    facts = {"finished": True, "metrics": {}, "ended_at": "2026-01-01T00:00:00+00:00"}
    (folder / "summary.json").write_text(json.dumps(facts))
    record = {
        "protocol": with_fingerprint(PROTOCOL),
        "sampling": {},
        "metrics": {f"fid/{NAME}": fid, f"fid_real/{NAME}": 96.3},
        "checkpoint": "abc",
    }
    (folder / "evaluations/one.json").write_text(json.dumps(record))
    published.mark(folder, "abc", None)
    return folder
