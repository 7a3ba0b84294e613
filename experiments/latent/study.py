"""Pixels or latents: which makes the better DiT in the same time of training?

    python experiments/latent/study.py [--seeds 0 1 2] [--minutes 5] [overrides ...]

trains the first stage of fashion_mnist/kl once, and then, for each seed, DiTs of equal width and
depth for equal time, one after another: on pixels with patches of 4 and of 2, and on latents. All
are sampled and measured alike. Finished work is kept, so the same command resumes where it was
stopped, and two commands with other seeds can share the work; more overrides apply to each DiT.
Writes results.json, table.md, fid.png and samples.png for everything finished in --out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torchvision.io import read_image

from diffusion_lab.analysis import plots
from diffusion_lab.runs.opening import open_diffusion_run

HERE = Path(__file__).parent
MODELS = {
    "pixels, patch 4": ["backbone.patch=4"],
    "pixels, patch 2": ["backbone.patch=2"],
    "latents, patch 2": ["backbone.patch=2", "first_stage=kl"],
}
SIZE = ["backbone.width=192", "backbone.heads=3", "backbone.depth=4"]
MEASURED = ["metrics.reference_size=10_000", "metrics.num_samples=1000"]
DRAWN = 100  # number of images in the timed drawing
ROUNDS = 3  # rounds of the timed drawing, in which models take turns


def lab(command: str, *overrides: str) -> None:
    """Runs `diffusion-lab` and stops at its first error."""
    subprocess.run([sys.executable, "-m", "diffusion_lab", command, *overrides], check=True)


def finished(folder: Path) -> bool:
    """Whether a run exists and has been evaluated."""
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["finished"]


def train(command: str, folder: Path, *overrides: str) -> Path:
    """Trains a run, or resumes it, unless it is finished; returns its folder."""
    if not finished(folder):
        if (folder / "checkpoints" / "last.ckpt").exists():
            lab(command, f"resume={folder}")
        else:
            lab(command, *overrides, f"run_dir={folder}")
    return folder


def folder_of(model: str, seed: int, out: Path) -> Path:
    return out / f"{model}_seed{seed}".replace(", ", "_").replace(" ", "")


def drawing_speeds(folders: dict[str, Path]) -> dict[str, float]:
    """Measures images per second drawn on one thread, decoded: the best of ROUNDS, in turns."""
    torch.set_num_threads(1)
    where = {"data_root": None, "device": "cpu", "precision": "auto"}
    runs = {
        model: open_diffusion_run(OmegaConf.create(where | {"run": str(folder)}))
        for model, folder in folders.items()
    }
    seconds = {model: [] for model in runs}
    for _ in range(ROUNDS):
        for model, run in runs.items():
            pipeline = run.pipeline(run.saved)
            begin = time.perf_counter()
            with run.autocast:
                pipeline(range(DRAWN))
            seconds[model].append(time.perf_counter() - begin)
    return {model: DRAWN / min(times) for model, times in seconds.items()}


def rows_of(out: Path) -> list[dict]:
    """Collects the results of each finished run."""
    rows = []
    for model in MODELS:
        for folder in sorted(out.glob(folder_of(model, 0, Path()).name.removesuffix("0") + "*")):
            if finished(folder):
                summary = json.loads((folder / "summary.json").read_text())
                speeds = [
                    row["train/images_per_second"]
                    for row in map(json.loads, (folder / "metrics.jsonl").open())
                    if "train/images_per_second" in row
                ]
                kept = ("parameters", "images_seen", "wall_seconds", "threads", "precision")
                rows.append(
                    {"model": model, "seed": int(folder.name.rpartition("seed")[2])}
                    | {key: summary[key] for key in kept}
                    | {
                        "train_images_per_second": statistics.median(speeds),
                        "fid": metric(summary, "fid"),
                        "kid": metric(summary, "kid"),
                        "device": summary["device"],
                    }
                )
    return rows


def metric(summary: dict, kind: str) -> float:
    """Returns a metric by the first part of its name, such as fid."""
    found = (v for name, v in summary["metrics"].items() if name.startswith(f"{kind}/"))
    return next(found)


def spread(values: list[float], digits: int) -> str:
    """Writes mean and standard deviation over the seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(rows: list[dict], drawing: dict[str, float]) -> str:
    """Writes mean and standard deviation over seeds, one line per model."""
    lines = [
        "| diffused | params | seeds | images seen | training, images/s | drawing, images/s "
        "| FID | KID |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        runs = [row for row in rows if row["model"] == model]
        if runs:
            lines.append(
                f"| {model} | {runs[0]['parameters'] / 1e6:.2f} M | {len(runs)} "
                f"| {spread([r['images_seen'] / 1000 for r in runs], 0)} k "
                f"| {spread([r['train_images_per_second'] for r in runs], 0)} "
                f"| {drawing[model]:.1f} "
                f"| {spread([r['fid'] for r in runs], 1)} | {spread([r['kid'] for r in runs], 3)} |"
            )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], first_stage: dict, path: Path) -> None:
    """Plots a point per seed, a line at the mean, and rFIDs of the first stage and real images."""
    figure = Figure((6, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for place, model in enumerate(MODELS):
        values = [row["fid"] for row in rows if row["model"] == model]
        axes.plot([place] * len(values), values, "o", alpha=0.6, color=f"C{place}")
        axes.hlines(statistics.mean(values), place - 0.3, place + 0.3, color=f"C{place}")
    axes.axhline(
        metric(first_stage, "rfid"), color="C2", linestyle=":", label="rFID of the KL stage"
    )
    axes.axhline(
        metric(first_stage, "rfid_real"), color="grey", linestyle="--", label="real images"
    )
    axes.set_xticks(range(len(MODELS)), MODELS)
    axes.set_ylabel("FID (lower is better)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    plots.save(figure, path)


def samples(folders: dict[str, Path], path: Path) -> None:
    """Puts the last sample grids of one seed side by side."""
    figure = Figure((4 * len(folders), 4.6), dpi=110, layout="constrained")
    for axes, (model, folder) in zip(
        figure.subplots(1, len(folders)), folders.items(), strict=True
    ):
        image = read_image(str(max((folder / "samples").glob("step_*.png"))))
        axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", interpolation="nearest")
        axes.set_title(model)
        axes.set_axis_off()
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="reach every DiT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=int, default=5, help="of training, each")
    parser.add_argument("--out", type=Path, default=Path("outputs/latent"))
    arguments = parser.parse_args()
    out = arguments.out
    kl = train("train-autoencoder", out / "kl", "experiment=fashion_mnist/kl", *MEASURED)
    for seed in arguments.seeds:  # so that a study cut short has compared all models
        for model, chosen in MODELS.items():
            train(
                "train",
                folder_of(model, seed, out),
                "experiment=fashion_mnist/conditioning",
                *SIZE,
                *chosen,
                *([f"first_stage.run={kl}"] if "first_stage=kl" in chosen else []),
                *MEASURED,
                "trainer.max_steps=100_000",
                f"trainer.max_time='00:00:{arguments.minutes:02}:00'",
                f"seed={seed}",
                *arguments.overrides,
            )
    first_stage = json.loads((kl / "summary.json").read_text())
    folders = {model: folder_of(model, arguments.seeds[0], out) for model in MODELS}
    rows, drawing = rows_of(out), drawing_speeds(folders)
    report = {"first_stage": first_stage, "drawing_images_per_second": drawing, "rows": rows}
    (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows, drawing))
    plot(rows, first_stage, HERE / "fid.png")
    samples(folders, HERE / "samples.png")
    print(table(rows, drawing))


if __name__ == "__main__":
    main()
