"""Four ways to take a condition, for DiT and Mamba: which learns best at equal parameters?

    python experiments/conditioning/study.py [--seeds 0 1 2] [--networks dit ...] [overrides ...]

trains each composition of COMPOSITIONS with each seed as one run folder under --out, draws 1,000
samples of each and reads their class by a classifier of the data, made by train-extractor. Finished
work is kept, so the same command resumes where it was stopped, and two commands with other seeds or
networks can share the work; more overrides, such as trainer.max_steps=100000, apply to every run.
Writes results.json, table.md and ablation.png for everything that is finished in --out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from diffusion_lab.analysis import plots
from diffusion_lab.metrics.extractor import Classifier

HERE = Path(__file__).parent
EXPERIMENT = "experiment=fashion_mnist/conditioning"
SAMPLES = 1000
# sizes from `diffusion-lab match`, within 2 % of the parameters of the first:
#   diffusion-lab match backbone=dit backbone/block=in_context backbone.depth=4 backbone.heads=3 \
#     'reference="backbone=dit backbone.width=192 backbone.heads=3 backbone.depth=4"'
COMPOSITIONS = {
    "dit": {
        "adaln_zero": {"width": 192, "heads": 3, "depth": 4},
        "adaln": {"width": 204, "heads": 3, "depth": 4},
        "cross_attention": {"width": 204, "heads": 3, "depth": 4},
        "in_context": {"width": 232, "heads": 4, "depth": 4},
    },
    "mamba": {
        "adaln_zero": {"width": 212, "depth": 6},
        "adaln": {"width": 224, "depth": 6},
        "cross_attention": {"width": 200, "depth": 6},
        "in_context": {"width": 252, "depth": 6},
    },
    "mamba2": {
        "adaln_zero": {"width": 208, "depth": 6, "state_space.head_channels": 52},
        "adaln": {"width": 216, "depth": 6, "state_space.head_channels": 72},
        "cross_attention": {"width": 196, "depth": 6, "state_space.head_channels": 56},
        "in_context": {"width": 244, "depth": 6, "state_space.head_channels": 61},
    },
    "unet_small": {"added to the embedding": {}},
}
# a quarter of the steps, as it has a tenth of DiT's speed on a CPU
SHORTENED = {"mamba": ["trainer.max_steps=500"]}


def lab(command: str, *overrides: str) -> None:
    """Runs `diffusion-lab` and stops at its first error."""
    subprocess.run([sys.executable, "-m", "diffusion_lab", command, *overrides], check=True)


def folder_of(network: str, block: str, seed: int, out: Path) -> Path:
    return out / f"{network}_{block}_seed{seed}".replace(" ", "_")


def run(network: str, block: str, seed: int, out: Path, extra: list[str]) -> Path:
    """Trains, resumes or finds a run, as in a study, and returns its folder once it is finished."""
    folder = folder_of(network, block, seed, out)
    size = COMPOSITIONS[network][block]
    chosen = [f"backbone.{key}={value}" for key, value in size.items()]
    if size:
        chosen.append(f"backbone/block={block}")
    chosen += SHORTENED.get(network, [])
    chosen += [f"backbone={network}", f"seed={seed}", f"run_dir={folder}", *extra]
    lab("train", EXPERIMENT, "study_name=conditioning", *chosen)
    return folder


def samples_of(folder: Path) -> Path:
    """The path of the array of a run's samples, drawn or not."""
    return folder / "samples" / "judged.npz"


def draw(folder: Path) -> None:
    """Draws a run's samples if they are not there."""
    file = samples_of(folder)
    if not file.exists():
        output = file.with_suffix("")
        lab("sample", f"run={folder}", f"num_samples={SAMPLES}", "save=npz", f"output={output}")


def trained_classifier(data: str) -> Classifier:
    """Returns the classifier of FashionMNIST, and trains it if it is missing."""
    path = Path(data) / "extractors" / "fashion_mnist.safetensors"
    if not path.exists():
        lab("train-extractor", "data=fashion_mnist", f"data.source.root={data}", f"output={path}")
    classifier = Classifier(str(path))
    classifier.load("cpu")
    return classifier


def accuracy(classifier: Classifier, file: Path) -> float:
    """The share of drawn images that the classifier puts into the class that was asked for."""
    with np.load(file, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        right = classifier.guesses(images) == torch.from_numpy(arrays["labels"])
    return right.double().mean().item()


def row(network: str, block: str, folder: Path, classifier: Classifier) -> dict:
    """Collects all results of one run."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "network": network,
        "block": block,
        "seed": int(folder.name.rpartition("seed")[2]),
        "parameters": summary["parameters"],
        "wall_seconds": summary["wall_seconds"],
        "images_seen": summary["images_seen"],
        "device": f"{summary['device']}, {summary['threads']} threads, {summary['precision']}",
        "metrics": {k: v for k, v in summary["metrics"].items() if not k.startswith("val_by")},
        "accuracy": accuracy(classifier, samples_of(folder)),
    }


def finished(out: Path, classifier: Classifier) -> list[dict]:
    """Returns a row for each run in `out` whose samples are drawn, in the order of COMPOSITIONS."""
    rows = []
    for network, blocks in COMPOSITIONS.items():
        for block in blocks:
            pattern = folder_of(network, block, 0, Path()).name.removesuffix("0") + "*"
            for folder in sorted(out.glob(pattern)):
                if samples_of(folder).exists():
                    rows.append(row(network, block, folder, classifier))
    return rows


def metric(row: dict, kind: str) -> float:
    """Returns a row's metric by the first part of its name, such as fid."""
    return next(value for name, value in row["metrics"].items() if name.startswith(f"{kind}/"))


def spread(values: list[float], digits: int) -> str:
    """Writes mean and standard deviation over the seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def groups(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Groups the rows of all seeds by composition."""
    grouped = {}
    for row in rows:
        grouped.setdefault((row["network"], row["block"]), []).append(row)
    return grouped


def table(rows: list[dict]) -> str:
    """Writes mean and standard deviation over seeds, one line per composition."""
    lines = [
        "| network | condition | params | images | seeds | FID | accuracy | test loss | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (network, block), runs in groups(rows).items():
        lines.append(
            f"| {network} | {block} | {runs[0]['parameters'] / 1e6:.2f} M "
            f"| {runs[0]['images_seen'] // 1000}k | {len(runs)} "
            f"| {spread([metric(r, 'fid') for r in runs], 1)} "
            f"| {spread([100 * r['accuracy'] for r in runs], 1)} % "
            f"| {spread([r['metrics']['test/loss'] for r in runs], 4)} "
            f"| {spread([r['wall_seconds'] / 60 for r in runs], 1)} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Plots FID and accuracy of each composition: a point per seed, a line at the mean."""
    grouped = groups(rows)
    figure = Figure((11, 4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    for place, ((network, _), runs) in enumerate(grouped.items()):
        for axis, values in zip(
            axes,
            ([metric(r, "fid") for r in runs], [100 * r["accuracy"] for r in runs]),
            strict=True,
        ):
            colour = f"C{list(COMPOSITIONS).index(network)}"
            axis.plot([place] * len(values), values, "o", color=colour, alpha=0.6)
            axis.hlines(statistics.mean(values), place - 0.3, place + 0.3, color=colour)
    names = [f"{network}\n{block}" for network, block in grouped]
    titles = ("FID (lower is better)", "label read by a classifier, %")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
    axes[0].axhline(metric(rows[0], "fid_real"), color="grey", linestyle="--", label="real images")
    axes[1].axhline(10, color="grey", linestyle=":", label="chance")
    for axis in axes:
        axis.legend(fontsize=8)
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="reach every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", choices=COMPOSITIONS, default=list(COMPOSITIONS))
    parser.add_argument("--out", type=Path, default=Path("outputs/conditioning"))
    parser.add_argument("--data", default="data")
    arguments = parser.parse_args()
    classifier = trained_classifier(arguments.data)
    for seed in arguments.seeds:  # so that a study cut short has compared all compositions
        for network in arguments.networks:
            for block in COMPOSITIONS[network]:
                draw(run(network, block, seed, arguments.out, arguments.overrides))
                print(table(finished(arguments.out, classifier)), flush=True)
    rows = finished(arguments.out, classifier)
    report = {"classifier": classifier.name, "rows": rows}
    (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows))
    plot(rows, HERE / "ablation.png")


if __name__ == "__main__":
    main()
