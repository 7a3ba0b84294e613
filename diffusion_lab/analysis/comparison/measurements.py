"""The measurements that are compared: metrics, losses, memorisation and costs."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.copies import of_controls
from diffusion_lab.build.config_keys import Means, means
from diffusion_lab.common.formats import some
from diffusion_lab.metrics import Quantity
from diffusion_lab.metrics.quantities import (
    BITS_PER_CODE,
    QUANTITIES,
    TEST_LOSS,
    VALIDATION_LOSS,
)

CODES = f"test/{BITS_PER_CODE.name}"
OF_SUMMARY = ("images_seen", "parameters", "macs", "training_seconds", "training_images")


def judged_by(runs: Iterable[Run]) -> list[Quantity]:
    """The quantities by which runs are compared; user-defined metrics come last."""
    return [quantity for quantity in tabled(runs) if quantity.judged]


def tabled(runs: Iterable[Run]) -> list[Quantity]:
    """The quantities that tables show; user-defined metrics come last."""
    runs = list(runs)
    records = [record for run in runs for record in (run.summary, *run.kept)]
    extra = [Quantity(**facts) for each in records for facts in each.get("extra_quantities", ())]
    known = {quantity.name: quantity for quantity in (*QUANTITIES, *of_controls(runs), *extra)}
    stages = {OmegaConf.select(run.config, "first_stage.sha256") for run in with_codes(runs)}
    if len(stages) > 1:  # codes of other first stages are other data
        del known[BITS_PER_CODE.name]
    return [quantity for quantity in known.values() if quantity.judged or quantity.tabled]


def with_codes(runs: Iterable[Run]) -> list[Run]:
    """The runs of models of codes."""
    return [run for run in runs if CODES in run.summary.get("metrics", {})]


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
    run: Run, measured: dict[str, float], names: Mapping[str, str], copies: dict[str, float]
) -> dict[str, float]:
    """All values of a run by short name: metrics, their spreads, real images, and costs."""
    found = {kind: measured.get(name) for kind, name in names.items()}
    found |= {
        TEST_LOSS.name: run.summary["metrics"].get("test/loss"),
        BITS_PER_CODE.name: run.summary["metrics"].get(CODES),
        VALIDATION_LOSS.name: run.summary["metrics"].get("val/loss"),
        "images_per_second": run.images_per_second,
        "peak_memory": run.summary.get("peak_memory_bytes"),
        **{name: run.summary.get(name) for name in OF_SUMMARY},
        "sampling_seconds": sampling_seconds(run, measured),
        **copies,
    }
    return {k: v for k, v in found.items() if v is not None}


def sampling_seconds(run: Run, measured: dict[str, float]) -> float | None:
    """The seconds of a sample, drawn as those that these metrics are of; None if not known."""
    drawn = [each for each in run.kept if each["metrics"].items() <= measured.items()]
    return next((each["sampling_seconds"] for each in drawn if each.get("sampling_seconds")), None)


def finite(values: dict[str, float]) -> dict[str, float]:
    """The values that are finite numbers."""
    return {kind: value for kind, value in values.items() if math.isfinite(value)}


def not_finite(run: Run, values: dict[str, float]) -> list[str]:
    """A sentence on the metrics of a run that are no finite numbers, if there are any."""
    lost = values.keys() - finite(values).keys()
    titles = [each.title for each in (*tabled([run]), VALIDATION_LOSS) if each.name in lost]
    if not titles:
        return []
    return [f"{run.folder} has no finite {some(titles)}, so means leave its seed out there"]
