"""The figures of the README, drawn from published records in the style of reports.

    python experiments/figures.py           # draws results_*.svg in this folder
    python experiments/figures.py --check   # names those whose numbers are not the records'

A file begins with all numbers of its figure in words, for readers who cannot see it.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape, unescape
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from stated import value_of

from diffusion_lab.common.files import write_atomically
from diffusion_lab.metrics.quantity import quantity_of
from diffusion_lab.report import figures, tests
from diffusion_lab.report.arms import COLOUR_OF

HERE = Path(__file__).parent
UNET, DIT, MAMBA = "U-Net", "DiT", "Mamba-2"
SIZE = (8.2, 3.4)  # inches, of two panels
PAPER = '<rect width="100%" height="100%" fill="#ffffff"/>'  # pages in dark mode show it, too
LESS_REAL = "FID less that of real images"
Line = dict[float, list[float]]  # the values of runs by their place on the x axis
Lines = Mapping[str, Line]
Change = tuple[str, float, float, float, bool]  # label, change in %, its interval, whether shown


def runs(folder: str) -> pd.DataFrame:
    """The runs of a published folder, with the short names of metrics."""
    return pd.read_csv(HERE / folder / "runs.csv").rename(columns=lambda name: name.split("/")[0])


def samplings(folder: str) -> pd.DataFrame:
    """The samplings of the sweep of an experiment that has the name of its folder."""
    found = pd.read_csv(HERE / folder / "samplings.csv")
    return found[found.sweep == folder]


def line(known: pd.DataFrame, x: str, metric: str = "fid") -> Line:
    """The values of runs by x; FID less that of real images."""
    less = known["fid_real"] if metric == "fid" else 0
    return {place: [*own] for place, own in known.assign(y=known[metric] - less).groupby(x).y}


def by_images() -> Lines:
    """FID by images seen, at 48 million multiply-accumulates.

    Of 2,000 samples up to 80,000 images, and of 10,000 after them.
    """
    scaling, later, last = (
        runs(f"{each}/published") for each in ("scaling", "unet_vs_dit", "crossing")
    )
    found = {}
    for name, size in ((UNET, "UNet · channels=16"), (DIT, "DiT · width=160")):
        found[name] = line(scaling[scaling.composition.str.startswith(f"{size} ")], "images_seen")
        found[name] |= line(later[later.composition == size.split()[0]], "images_seen")
        found[name] |= line(last[last.composition == name], "images_seen")
    return found


def by_sampler() -> Lines:
    """FID of 1,000 samples by network calls, of samplers on three U-Nets."""
    known = samplings("samplers")
    names = {"unipc": "UniPC", "ddim": "DDIM", "ddpm": "DDPM", "restart": "restart"}
    return {title: line(known[known.sampler == own], "calls") for own, title in names.items()}


def by_objective() -> Lines:
    """FID of 2,000 samples by network calls, of objectives for few calls."""
    known = pd.read_csv(HERE / "frontier/calls.csv")
    names = {"Teacher": "flow matching, UniPC", "alpha-Flow": "alpha-Flow", "MeanFlow": "MeanFlow"}
    names |= {"Improved-MeanFlow": "improved MeanFlow", "Lagrangian": "Lagrangian", "sCM": "sCM"}
    return {title: line(known[known.run == own], "steps") for own, title in names.items()}


def by_data(metric: str) -> Lines:
    """A line for each network over its training images."""
    known = runs("low_data/published")
    known["nearer"] = [100 * nearer(place) for place in known.folder]
    networks = {UNET: "UNet", DIT: "DiT", MAMBA: "Mamba2"}
    return {
        title: line(known[known.composition.str.startswith(own)], "training_images", metric)
        for title, own in networks.items()
    }


def nearer(run: str) -> float:
    """The share of a run's samples that are nearer to training than to test images by pixels."""
    report = HERE / "low_data/published" / run / "memorization/report.json"
    return value_of(report, "neighbours.pixels.nearer_to_training")


def changes() -> Iterator[Change]:
    """Yields what changes FID less real, and by how much, by the test of each study."""
    networks = ("UNet", "DiT")
    yield change(f"{UNET} instead of {DIT}", runs("unet_vs_dit/published"), networks)
    in_time = runs("unet_vs_dit/published_equal_time")
    yield change("... in equal time, half rates", in_time, ("U-Net", "DiT"), test=tests.WELCH)
    yield change("... on CIFAR-10", runs("cifar10_small/published"), networks)
    yield change("... as DDPMs", runs("write_up/published"), networks)
    muon = runs("optimizers/published")
    pairs = [(f"{each} · Muon", f"{each} · AdamW") for each in ("UNet", "DiT", "Mamba2")]
    yield change(f"Muon instead of AdamW: {UNET}", muon, pairs[0], asked=pairs)
    yield change(f"Muon instead of AdamW: {DIT}", muon, pairs[1], asked=pairs)
    rates = (runs(f"unet_vs_dit/{each}") for each in ("published_rate", "published"))
    half, full = (
        each[each.composition == "Mamba2"].assign(composition=i) for i, each in enumerate(rates)
    )
    yield change(f"half the learning rate: {MAMBA}", pd.concat([half, full]), (0, 1))
    ways = runs("conditioning/published")
    pair = ("DiT · AdaLNZero", "DiT · CrossAttentionBlock")
    yield change(
        "adaLN-Zero, not cross-attention: DiT", ways[ways.composition.str.startswith("DiT")], pair
    )
    guided = samplings("guidance").rename(columns={"guidance.scale": "composition"})
    for network, scale in (("DiT", 1.5), ("UNet", 1.25)):
        own = guided[guided.network == network]
        asked = [(each, 1) for each in own.composition.unique() if each != 1]
        yield change(
            f"guidance of {scale}: {UNET if network == 'UNet' else DIT}",
            own,
            (scale, 1),
            asked=asked,
        )
    pair = tuple(f"{each} · max_time=00:00:10:00" for each in ("TrainedKL", "Pixels"))
    by = ("classifier_fid", tests.WELCH)
    yield change("latents, not pixels (classifier FID)", runs("latent/published"), pair, *by)
    few, by = runs("frontier/published"), ("fid", tests.WELCH)
    yield change("2 calls of alpha-Flow, not 10 of UniPC", few, ("alpha-Flow", "Teacher"), *by)


def change(
    label: str,
    known: pd.DataFrame,
    pair: Sequence,
    metric: str = "fid",
    test: str = tests.PAIRED,
    asked: Sequence | None = None,
) -> Change:
    """The change of a metric, less its value for real images, from the second arm to the first."""
    values = pd.DataFrame(
        {"arm": known.composition, "data": "", "seed": known.seed, "value": known[metric]}
    )
    real = known[f"{metric}_real"].iloc[0]
    (panel,) = tests.panels(values, quantity_of(metric), test, asked, real)
    own = next(p for p in panel.pairs.itertuples() if {p.ahead, p.behind} == {*pair})
    ends = own.relative, own.relative_low, own.relative_high
    if own.ahead == pair[1]:
        ends = tuple(1 / (1 + each) - 1 for each in (ends[0], ends[2], ends[1]))
    return label, *(100 * end for end in ends), bool(own.significant)


def plot(axes: Axes, lines: Lines, places: Sequence[int], **look: object) -> None:
    """Draws the mean over runs, and their range, of each line."""
    for place, own in zip(places, lines.values(), strict=True):
        means = [sum(values) / len(values) for values in own.values()]
        axes.plot([*own], means, **figures.look_of(place) | look)
        ends = zip(*((min(values), max(values)) for values in own.values()), strict=True)
        axes.vlines([*own], *ends, color=figures.colour(place), linewidth=1)


def logarithmic(axes: Axes, x: Sequence[float], y: Sequence[float] = ()) -> None:
    """Gives axes logarithmic scales, with plain numbers at some places."""
    axes.margins(x=0.08)
    for axis, scale, marks in ((axes.xaxis, axes.set_xscale, x), (axes.yaxis, axes.set_yscale, y)):
        if marks:
            scale("log")
            axis.set_major_locator(FixedLocator(marks))
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.set_minor_locator(NullLocator())


def said(lines: Lines) -> str:
    """The means of lines in words."""
    found = []
    for name, own in lines.items():
        points = (f"{sum(values) / len(values):.3g} at {x:,.0f}" for x, values in own.items())
        found.append(f"{name} {', '.join(points)}")
    return "; ".join(found)


def longer() -> figures.Drawing:
    """Draws FID along training."""
    lines = by_images()
    legend = {each: COLOUR_OF[each] for each in lines}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="training images seen", ylabel=LESS_REAL)
        plot(axes, lines, [*legend.values()])
        logarithmic(axes, [20_000, 80_000, 300_000, 1_000_000], [50, 100, 200, 400, 800])

    count = "2,000 samples up to 80,000 images, and 10,000 after them"
    words = f"{LESS_REAL}, means of two to five runs, {count}: {said(lines)}."
    title = "Longer training shrinks the gap"
    return figures.draw("results_by_images", title, words, paint, legend, (5.2, 3.4))


def forest() -> figures.Drawing:
    """Draws the changes and their intervals, full marks where a study's test shows them."""
    known = [*changes()]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel=f"change of {LESS_REAL}, %, with 95 % interval")
        axes.axvline(0, color=figures.INK, linewidth=1)
        for row, (label, mean, low, high, shown) in enumerate(known):
            place = next((COLOUR_OF[n] for n in (MAMBA, DIT, UNET) if label.endswith(f": {n}")), 7)
            tint = figures.colour(place)
            axes.plot([low, high], [row] * 2, color=tint, linewidth=2, alpha=0.6)
            axes.plot([mean], [row], "o", ms=6, color=tint, mfc=tint if shown else "white")
        axes.set_yticks(range(len(known)), [each[0] for each in known])
        axes.set_ylim(len(known) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)

    said = "; ".join(
        f"{label} {mean:+.0f} % ({low:+.0f} to {high:+.0f})" + ", not shown" * (not shown)
        for label, mean, low, high, shown in known
    )
    words = f"Full marks: shown by the study's test. {said}."
    title = "What changes FID, and by how much"
    return figures.draw("results_changes", title, words, paint, size=(7.4, 4.3), left=3.1)


def calls() -> figures.Drawing:
    """Draws FID by network calls, of samplers and of objectives."""
    samplers, objectives = by_sampler(), by_objective()

    def paint(figure: Figure) -> None:
        figure.subplots_adjust(wspace=0.12)
        beside = figure.subplots(1, 2, sharey=True)
        titles = "samplers, 300,000 images seen", "objectives, training of equal FLOPs"
        for axes, lines, title in zip(beside, (samplers, objectives), titles, strict=True):
            plot(axes, lines, range(3, 3 + len(lines)))
            logarithmic(axes, [1, 2, 5, 10, 20, 50, 100], [50, 100, 200, 500, 1000])
            axes.set(xlabel="network calls", title=title)
            axes.legend(axes.lines, [*lines], frameon=False, fontsize=8)
        beside[0].set_ylabel(LESS_REAL)

    words = (
        f"{LESS_REAL}, means of three U-Nets. Of 1,000 samples: {said(samplers)}. "
        f"Of 2,000 samples: {said(objectives)}."
    )
    return figures.draw(
        "results_calls", "How many network calls?", words, paint, size=SIZE, left=0.8
    )


def few_images() -> figures.Drawing:
    """Draws FID, copies, and what leans towards training images, by the number of these."""
    fid, copies, leaning = by_data("fid"), by_data("pixel_copy_ratio"), by_data("nearer")
    legend = {each: COLOUR_OF[each] for each in fid}

    def paint(figure: Figure) -> None:
        figure.subplots_adjust(wspace=0.25)
        first, second = figure.subplots(1, 2)
        plot(first, fid, [*legend.values()])
        plot(second, copies, [*legend.values()])
        plot(second, leaning, [*legend.values()], linestyle=":")
        second.axhline(50, color=figures.INK, linestyle="--", linewidth=0.8)
        logarithmic(first, [60, 550, 5_500, 55_000], [100, 150, 200, 300, 400])
        logarithmic(second, [60, 550, 5_500, 55_000])
        first.set(xlabel="training images", ylabel=LESS_REAL)
        second.set(xlabel="training images", ylabel="% of samples")
        second.set_title("near copies; dotted: nearer to training than test")

    words = (
        f"Means of three runs. {LESS_REAL}: {said(fid)}. Near copies, %: {said(copies)}. Nearer to "
        f"training than to test images, %, 50 expected: {said(leaning)}."
    )
    return figures.draw(
        "results_few_images", "Few training images", words, paint, legend, SIZE, 0.8
    )


def file_of(drawing: figures.Drawing) -> str:
    """The file of a figure on white paper, with its title and its numbers in words."""
    head, start, rest = drawing.file.partition("<svg")
    place = rest.index(">") + 1
    told = f"<title>{escape(drawing.title)}</title><desc>{escape(drawing.words)}</desc>"
    return f"{head}{start}{rest[:place]}{told}{PAPER}{rest[place:]}"


def main(arguments: Sequence[str], folder: Path = HERE) -> int:
    """Draws or checks the figures in a folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whose numbers would change")
    check, differ = parser.parse_args(arguments).check, False
    for drawing in (longer(), forest(), calls(), few_images()):
        path = folder / f"{drawing.name}.svg"
        if not check:
            write_atomically(path, file_of(drawing))
            continue
        known = re.search("<desc>(.*?)</desc>", path.read_text() if path.is_file() else "")
        if not known or unescape(known[1]) != drawing.words:
            print(f"{path.name} differs from its records; run python experiments/figures.py")
            differ = True
    return int(differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
