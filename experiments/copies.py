"""When copies begin: the numbers and the picture of published runs with `memorization step=all`.

    python experiments/copies.py experiments/copies

From FOLDER/published it writes copies.csv, what each kept checkpoint copies; begins.csv, after how
many images seen the copies of a run begin; and laws.csv, the exponent p of c * n^p that is fitted
to these numbers over n training images, for each subset of them by itself. copies.png shows all
three. Copies begin at the first checkpoint at which a tenth of the samples are near copies by
pixels. A number of images at which a run of a network has none is left out of its laws.

As checkpoints are apart, begins.csv has the one `before`, too, and where a line between the shares
of the two crosses a tenth; laws.csv has the exponent over these `between`.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from omegaconf import OmegaConf

from diffusion_lab.cli.study.jobs import BETWEEN
from diffusion_lab.common.files import read_json
from diffusion_lab.report.arms import COLOUR_OF
from diffusion_lab.report.figures import INK, STYLE, look_of

BEGIN = 0.1  # of the samples
SIZE = ["network", "images"]
RUN = [*SIZE, "seed"]


def copies_of(run: Path) -> pd.DataFrame:
    """A row for each checkpoint of a run, with the neighbours of its samples by pixels."""
    cfg, report = OmegaConf.load(run / "config.yaml"), read_json(run / "memorization/report.json")
    own = {"network": cfg.arm.partition(BETWEEN)[0], "images": report["training_images"]}
    rows = [
        own | {"seed": cfg.seed, "images_seen": int(step) * cfg.batch_size} | found["pixels"]
        for step, found in report["steps"].items()
    ]
    return pd.DataFrame(rows).sort_values("images_seen")


def begins_of(copies: pd.DataFrame) -> pd.DataFrame:
    """A row for each run whose copies begin, with the images seen until then."""
    earlier = copies.groupby(RUN)[["images_seen", "copies"]].shift(fill_value=0)
    before, share = earlier["images_seen"], earlier["copies"]
    part = (BEGIN - share) / (copies["copies"] - share)
    between = before + part * (copies["images_seen"] - before)
    found = copies.assign(before=before, between=between)
    return found[found["copies"] >= BEGIN].drop_duplicates(RUN)


def laws_of(begins: pd.DataFrame, copies: pd.DataFrame) -> pd.DataFrame:
    """A row for each network and subset with the law of its numbers of images, if it has two."""
    never = copies.drop_duplicates(RUN).merge(begins[RUN], how="left", indicator="which")
    never = never[never.which == "left_only"].set_index(SIZE).index
    found = begins[~begins.set_index(SIZE).index.isin(never)]
    rows = []
    for (network, seed), own in found.groupby(["network", "seed"], sort=False):
        if len(own) > 1:
            seen = np.log(own[["images_seen", "between"]])
            (exponent, between), (factor, _) = np.polyfit(np.log(own.images), seen, 1)
            rows.append((network, seed, len(own), exponent, np.exp(factor), between))
    names = ["network", "seed", "sizes", "exponent", "factor", "between"]
    return pd.DataFrame(rows, columns=names)


def paint(copies: pd.DataFrame, begins: pd.DataFrame, laws: pd.DataFrame) -> Figure:
    """Copies against images seen, a panel for each network, and where they begin against images."""
    networks = sorted(copies.network.unique(), key=COLOUR_OF.__getitem__)
    sizes = sorted(copies.images.unique())
    figure = Figure((2.9 * (len(networks) + 1) + 0.9, 3.4), dpi=120, layout="constrained")
    *panels, last = figure.subplots(1, len(networks) + 1)
    for axes, network in zip(panels, networks, strict=True):
        for place, size in enumerate(sizes):
            own = copies[(copies.network == network) & (copies.images == size)]
            for each, (_, run) in enumerate(own.groupby("seed")):
                look = look_of(3 + place) | {"label": "" if each else f"{size} images"}
                axes.plot(run.images_seen / 1000, 100 * run["copies"], linewidth=1, **look)
        axes.axhline(100 * BEGIN, color=INK, linestyle="--", linewidth=0.8)
        axes.set(title=network, xlabel="thousand images seen", ylim=(-2, 102))
        axes.tick_params(labelleft=axes is panels[0])
    panels[0].set_ylabel("near copies, % of samples")
    for place, network in enumerate(networks):
        own, law = (each[each.network == network] for each in (begins, laws))
        look = look_of(COLOUR_OF[network])
        # equal numbers would hide one another
        aside = own.images * (1 + 0.05 * (place - (len(networks) - 1) / 2))
        last.plot(aside, own.images_seen / 1000, linestyle="", label=network, **look)
        last.vlines(aside, own.before / 1000, own.images_seen / 1000, color=look["color"])
        if len(law):
            known = np.array([own.images.min(), own.images.max()])
            mean = np.exp(np.log(law.factor).mean()) * known ** law.exponent.mean()
            last.plot(known, mean / 1000, linewidth=1, color=look["color"])
    last.set(title="copies begin", xlabel="training images", ylabel="thousand images seen")
    last.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
    last.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    last.yaxis.set_major_formatter("{x:g}")
    for axis in (last.xaxis, last.yaxis):
        axis.set_minor_locator(NullLocator())
    for axes in (panels[0], last):
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if not (runs := sorted(folder.glob("published/runs/**/memorization/report.json"))):
        parser.error(f"{folder}/published has no run with memorization/report.json")
    copies = pd.concat([copies_of(report.parents[1]) for report in runs], ignore_index=True)
    begins = begins_of(copies)
    laws = laws_of(begins, copies)
    for name, frame in (("copies", copies), ("begins", begins), ("laws", laws)):
        frame.to_csv(folder / f"{name}.csv", index=False)
    with rc_context(STYLE | {"figure.facecolor": "white"}):
        FigureCanvasAgg(paint(copies, begins, laws)).print_png(str(folder / "copies.png"))


if __name__ == "__main__":
    main()
