"""The measurements that are compared: metrics, losses, memorisation and costs."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.build.config_keys import Means, means
from diffusion_lab.common.files import read_json
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.metric import FINGERPRINT, Protocol
from diffusion_lab.metrics.neighbours import COPIES, PIXEL_COPIES
from diffusion_lab.metrics.quantities import QUANTITIES, TEST_LOSS, VALIDATION_LOSS
from diffusion_lab.runs.samplings import Sampling

OF_SUMMARY = ("images_seen", "parameters", "macs", "training_seconds", "training_images")


def judged_by(runs: Iterable[Run]) -> list[Quantity]:
    """The quantities by which runs are compared; user-defined metrics come last."""
    return [quantity for quantity in tabled(runs) if quantity.judged]


def tabled(runs: Iterable[Run]) -> list[Quantity]:
    """The quantities that tables show; user-defined metrics come last."""
    records = [record for run in runs for record in (run.summary, *run.kept)]
    extra = [Quantity(**facts) for each in records for facts in each.get("extra_quantities", ())]
    known = {quantity.name: quantity for quantity in (*QUANTITIES, *extra)}
    return [quantity for quantity in known.values() if quantity.judged or quantity.tabled]


def losses_compare(runs: Iterable[Run]) -> bool:
    """Whether the denoising losses of all runs measure the same quantity."""
    decisive = Means.LOSS | Means.IDENTITY  # paths do not count: the same images may lie elsewhere
    known = [
        {key: value for key, value in run.known.items() if decisive in means(key)}
        for run in runs
        if not run.drawn_elsewhere
    ]
    return all(each == known[0] for each in known)


def full_names(measured: list[dict[str, float]]) -> dict[str, str]:
    """The full name of each metric, "fid" -> "fid/efficientnet_lite0-96/train10k-1k".

    If runs have several, as with two classifiers, the most common name counts.
    """
    counts = Counter(name for each in measured for name in each)
    names: dict[str, str] = {}
    for name, _ in counts.most_common():
        names.setdefault(name.partition("/")[0], name)
    return names


def values_of(
    run: Run, measured: dict[str, float], names: dict[str, str], copies: dict[str, float]
) -> dict[str, float]:
    """All finite values of a run by short name: metrics, their spreads, real images, and costs."""
    found = {kind: measured.get(name) for kind, name in names.items()}
    found |= {
        TEST_LOSS.name: run.summary["metrics"].get("test/loss"),
        VALIDATION_LOSS.name: run.summary["metrics"].get("val/loss"),
        "images_per_second": run.images_per_second,
        "peak_memory": run.summary.get("peak_memory_bytes"),
        **{name: run.summary.get(name) for name in OF_SUMMARY},
        **copies,
    }
    return {k: v for k, v in found.items() if v is not None and math.isfinite(v)}


def copy_ratios(
    runs: Sequence[Run], sampling: Sampling
) -> tuple[dict[Path, dict[str, float]], list[str]]:
    """The copy ratios of runs, by folder, and sentences on what is left out.

    A report counts if it is of a run's current weights and of `sampling`; reports of unequal
    protocols are all left out.
    """
    found: dict[Path, dict[str, float]] = {}
    protocols, said = [], []
    for run in runs:
        report = read_json(run.folder / "memorization" / "report.json")
        if "neighbours" not in report:
            continue
        if reason := unfit(run, report, sampling):
            said.append(f"Copy ratios of {run.folder} are left out: {reason}")
            continue
        ratios = (space["copy_ratio"] for space in report["neighbours"].values())
        found[run.folder] = dict(zip((COPIES.name, PIXEL_COPIES.name), ratios, strict=True))
        protocols.append(report["protocol"])
    if unequal := differing(protocols):
        words = "; ".join(f"{key} is {' or '.join(values)}" for key, values in unequal.items())
        said.append(
            f"Copy ratios are left out: they were not measured in the same way in all runs "
            f"({words}); run `diffusion-lab memorization` on all of them with the same settings"
        )
        return {}, said
    return found, said


def unfit(run: Run, report: dict, sampling: Sampling) -> str | None:
    """The reason why a memorisation report cannot be compared; None if it can."""
    again = f"measure them again with `diffusion-lab memorization run={run.folder}`"
    if sampling not in run.ways(report["sampling"]):
        return (
            f"its report is for another sampler, guidance or seed; {again}, sampled like the rest"
        )
    if not run.weights.known:
        return "its checkpoints are gone, so it is unknown whether its report belongs to them"
    if not run.weights.match(report):
        return f"its report is for other weights than the current ones; {again}"
    return None


def differing(protocols: Sequence[Protocol]) -> dict[str, list[str]]:
    """The keys in which protocols differ, each with its values as text."""
    keys = dict.fromkeys(key for each in protocols for key in each if key != FINGERPRINT)
    values = {key: list(dict.fromkeys(str(each.get(key)) for each in protocols)) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}
