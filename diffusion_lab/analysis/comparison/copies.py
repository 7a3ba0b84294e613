"""Copies of training images, as reports of `memorization` count them, with their controls."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.common.files import read_json
from diffusion_lab.metrics.metric import FINGERPRINT, HIGHER, LOWER, Protocol, Quantity
from diffusion_lab.metrics.neighbours import COPIES, PIXEL_COPIES
from diffusion_lab.runs.samplings import Sampling

SPACES = (("", ""), ("pixel_", " by pixels"))  # features and pixels, in names and in titles
BY_CONTROL = "copy_ratio_by_control"
FOUND = "copies_found_at_"  # starts the name of a level, as sigma / alpha
FOUND_WITH_GRAIN = "copies_found_with_grain_"  # starts the name of a level, in grey levels


def counted(
    runs: Sequence[Run], sampling: Sampling
) -> tuple[dict[Path, dict[str, float]], list[str]]:
    """The counts of copies of runs, by folder, and sentences on what is left out.

    A report counts if it is of a run's current weights and of `sampling`; reports of unequal
    protocols are all left out.
    """
    found: dict[Path, dict[str, float]] = {}
    protocols, said = [], []
    for run in runs:
        report = read_json(run.folder / "memorization" / "report.json")
        if "neighbours" not in report:
            continue
        try:
            reason = unfit(run, report, sampling)
            values, protocol = {} if reason else values_in(report), dict(report["protocol"])
        except (AttributeError, LookupError, TypeError, ValueError):
            reason = "the report of `memorization` is damaged"
        if reason:
            said.append(f"Copy ratios of {run.folder} are left out: {reason}")
            continue
        found[run.folder] = values
        protocols.append(protocol)
    if unequal := differing(protocols):
        words = "; ".join(f"{key} is {' or '.join(values)}" for key, values in unequal.items())
        said += [
            f"Copy ratios are left out, because runs measured them in different ways: {words}",
            "To compare copies, run `diffusion-lab memorization` on all runs with equal settings",
        ]
        return {}, said
    return found, said


def values_in(report: dict) -> dict[str, float]:
    """The counts of a report by short name: copies, and what its controls say of them."""
    found: dict[str, float] = {}
    controls = report.get("controls", {})
    ratios = (COPIES.name, PIXEL_COPIES.name)
    for (space, counts), ratio, (start, _) in zip(
        report["neighbours"].items(), ratios, SPACES, strict=True
    ):
        found[ratio] = counts["copy_ratio"]
        if "negative" in controls:
            found[start + BY_CONTROL] = controls["negative"]["neighbours"][space][BY_CONTROL]
        for control, levels, name in (
            ("positive", "sigma_over_alpha", FOUND),
            ("grain", "grey_levels", FOUND_WITH_GRAIN),
        ):
            for level, rates in controls.get(control, {}).get(levels, {}).items():
                found[f"{start}{name}{level}"] = rates[space]["copies"]
    return found


def of_controls(runs: Iterable[Run]) -> Iterator[Quantity]:
    """Yields the quantities of controls that runs have and that tables show: not those of grain."""
    shown = {"judged": False, "tabled": True}
    for name in dict.fromkeys(name for run in runs for name in run.values):
        for start, by in SPACES:
            level = name.removeprefix(start + FOUND)
            if name == start + BY_CONTROL:
                title, meaning = f"Copies{by}, by control", f"copies{by}, by a control run's limit"
                yield Quantity(name, title, meaning, LOWER, **shown)
            elif level != name:
                title = f"Copies found{by} at {level}"
                meaning = (
                    f"training images, noised to sigma / alpha of {level} and denoised by the run, "
                    f"that count as copies{by}"
                )
                yield Quantity(name, title, meaning, HIGHER, percent=True, **shown)


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
