"""The metrics of real images, damaged in known ways, against the training images.

    python experiments/metrics/sanity.py [--count 2000] [--classifier FILE] [override ...]

Test images replace generated ones: unchanged, with noise, blurred, with classes left out, labels
mixed up, few images repeated, and training images among them (memorised). Features are those of
efficientnet_lite0 and of the classifier in FILE, which `diffusion-lab train-extractor` makes.
Overrides choose the data, as in data=cifar10_zip. Writes NAME.json, NAME.md and NAME.png, named
after the data, next to this script.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffusion_lab.analysis import plots
from diffusion_lab.analysis.copy_controls import CopySpaces
from diffusion_lab.assembly.objects import build_images
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.data import ImageData
from diffusion_lab.metrics.extractor import Classifier, EfficientNetLite0
from diffusion_lab.metrics.generative import GenerativeMetrics, PreparedMetrics
from diffusion_lab.metrics.neighbours import Neighbours, equal_sides

HERE = Path(__file__).parent
Set = tuple[Tensor, Tensor]  # images uint8 (N, C, H, W), labels (N,)
DISTANCES = ("fid", "fid_infinity", "kid")
SHARES = ("precision", "recall", "density", "coverage")
OTHERS = ("inception_score", "accuracy", "nearer_to_training", "copies", "near_duplicates")


def noisy(std: float, images: Tensor, labels: Tensor) -> Set:
    """Adds Gaussian noise of `std` grey levels."""
    generator = torch.Generator().manual_seed(0)
    noise = std * torch.randn(images.shape, generator=generator)
    return (images + noise).round().clamp(0, 255).to(torch.uint8), labels


def blurred(std: float, images: Tensor, labels: Tensor) -> Set:
    """Blurs with a Gaussian of `std` pixels."""
    size = 2 * round(3 * std) + 3
    return gaussian_blur(images, [size, size], [std, std]), labels


def without(unused: Set, classes: int, images: Tensor, labels: Tensor) -> Set:
    """Replaces images of the first `classes` classes by unused images of the other classes."""
    kept, others = labels >= classes, unused[1] >= classes
    missing = int(len(images) - kept.sum())
    if missing > others.sum():
        raise ValueError(f"{missing} images of other classes are needed, not {others.sum()}")
    return (
        torch.cat([images[kept], unused[0][others][:missing]]),
        torch.cat([labels[kept], unused[1][others][:missing]]),
    )


def mislabelled(share: float, images: Tensor, labels: Tensor) -> Set:
    """Gives a share of the images the label of another of them: one class asked, another drawn."""
    count = round(share * len(images))
    return images, torch.cat([labels[:count].roll(1), labels[count:]])


def repeated(times: int, images: Tensor, labels: Tensor) -> Set:
    """Keeps the first images only, each `times` times."""
    index = torch.arange(len(images)) % (len(images) // times)
    return images[index], labels[index]


def memorised(data: ImageData, share: float, images: Tensor, labels: Tensor) -> Set:
    """Replaces a share of the images by training images."""
    count = round(share * len(images))
    images = torch.cat([data.train_images()[:count], images[count:]])
    return images, torch.cat([data.train_labels()[:count], labels[count:]])


def ladders(data: ImageData, count: int) -> dict[str, list[tuple[float, Callable[..., Set]]]]:
    """The kinds of damage to the first `count` test images, each from little to much."""
    # the second `count` test images are held out from memorised ones
    unused = data.test_images()[2 * count :], data.test_labels()[2 * count :]
    steps = {
        "noise, grey levels": (noisy, (2, 5, 10, 20, 40)),
        "blur, pixels": (blurred, (0.4, 0.6, 1.0, 1.5)),
        "classes dropped": (partial(without, unused), (1, 2, 5)),
        "wrong labels, share": (mislabelled, (0.1, 0.5, 1.0)),
        "each image, times": (repeated, (2, 4, 8)),
        "memorised, share": (partial(memorised, data), (0.1, 0.5, 1.0)),
    }
    return {
        name: [(value, partial(change, value)) for value in values]
        for name, (change, values) in steps.items()
    }


def measure(prepared: PreparedMetrics, data: ImageData, images: Tensor, labels: Tensor):
    """Computes all metrics of `images` as generated ones, by the first part of their names."""
    metrics = prepared.metrics
    observed = [metrics.observer(part) for part in images.split(64)]
    observed = metrics.observer.gather(observed, range(len(images)))
    values = prepared.compute(observed, labels)
    second = slice(metrics.num_samples, 2 * metrics.num_samples)
    spaces = CopySpaces(metrics, data.train_images(), mirrored=False)
    test = spaces.features(data.test_images()[second], "test")
    training = spaces.known[metrics.extractor.name]
    sides = equal_sides(data.train_labels(), data.test_labels()[second])
    values |= Neighbours.of([observed["features"]], [test], training, sides).results()
    return {name.split("/")[0]: value for name, value in values.items()}


def measure_all(extractor, data: ImageData, count: int, classifier: str | None) -> list[dict]:
    metrics = GenerativeMetrics(extractor, None, count, "data/reference", classifier=classifier)
    metrics.load(data, "cpu")
    prepared = metrics.prepare(data)
    images, labels = data.test_images()[:count], data.test_labels()[:count]
    rows = [{"what": "as it is", "much": 0, **measure(prepared, data, images, labels)}]
    for what, steps in ladders(data, count).items():
        for much, change in steps:
            changed = measure(prepared, data, *change(images, labels))
            rows.append({"what": what, "much": much, **changed})
            print(metrics.extractor.name, what, much, f"FID {changed['fid']:.4g}", flush=True)
    return [{"extractor": metrics.extractor.name, **row} for row in rows]


def table(rows: list[dict]) -> str:
    names = [name for name in (*DISTANCES, *SHARES, *OTHERS) if name in rows[0]]
    lines = [f"| {' | '.join(['what', 'how much', *names])} |"]
    lines.append("| --- " * (len(names) + 2) + "|")
    for row in rows:
        cells = [f"{row[name]:.3g}" for name in names]
        first = [row["what"], format(row["much"], "g")]
        lines.append(f"| {' | '.join([*first, *cells])} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Plots each kind of damage in a column: FID relative to undamaged images, and shares."""
    extractors = list(dict.fromkeys(row["extractor"] for row in rows))
    kinds = list(dict.fromkeys(row["what"] for row in rows))[1:]
    figure = Figure((3 * len(kinds), 5 * len(extractors)), dpi=90, layout="constrained")
    axes = figure.subplots(2 * len(extractors), len(kinds), squeeze=False, sharex="col")
    for band, extractor in enumerate(extractors):
        own = [row for row in rows if row["extractor"] == extractor]
        for column, kind in enumerate(kinds):
            steps = [own[0], *(row for row in own if row["what"] == kind)]
            above, below = axes[2 * band, column], axes[2 * band + 1, column]
            x = range(len(steps))
            above.plot(x, [row["fid"] / own[0]["fid"] for row in steps], "o-", label="FID")
            for name in (*SHARES, "accuracy", "nearer_to_training", "copies"):
                if name in own[0]:
                    below.plot(x, [row[name] for row in steps], "o-", label=name)
            below.set_xticks(x, [f"{row['much']:g}" for row in steps])
            below.set_ylim(-0.05, 1.3)
            above.set_title(kind, fontsize=10)
            above.set_yscale("log")
            for axis in (above, below):
                axis.grid(alpha=0.3, which="both")
        axes[2 * band, 0].set_ylabel(f"{extractor}\nFID by that of real images", fontsize=8)
        axes[2 * band + 1, 0].set_ylabel("shares", fontsize=8)
    lines = axes[1, 0].get_lines()
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=7)
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the data, as in data=cifar10_zip")
    parser.add_argument("--count", type=int, default=2000, help="images in each set")
    parser.add_argument("--classifier", help="file of `diffusion-lab train-extractor`")
    arguments = parser.parse_args()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=arguments.overrides, return_hydra_config=True)
    name = cfg.hydra.runtime.choices.data
    data = build_images(cfg)
    data.prepare_data()
    data.setup("fit")
    if 4 * arguments.count > len(data.test_images()):
        parser.error(f"--count must be at most a quarter of {len(data.test_images())} test images")
    extractors = [EfficientNetLite0()]
    if arguments.classifier:
        extractors.append(Classifier(arguments.classifier))
    rows = []
    for extractor in extractors:
        rows += measure_all(extractor, data, arguments.count, arguments.classifier)
    (HERE / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    tables = []
    for extractor in dict.fromkeys(row["extractor"] for row in rows):
        own = [row for row in rows if row["extractor"] == extractor]
        tables.append(f"`{extractor}`:\n\n{table(own)}")
    (HERE / f"{name}.md").write_text("\n".join(tables))
    plot(rows, HERE / f"{name}.png")


if __name__ == "__main__":
    main()
