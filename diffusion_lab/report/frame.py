"""The numbers of runs as one long frame: a row for each value, and how it was measured."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffusion_lab.assembly.config_keys import Means, flat, means
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.metrics import quantity
from diffusion_lab.report import records
from diffusion_lab.report.arms import Arm, grouped, runs_of
from diffusion_lab.report.records import AUTOENCODER, Run
from diffusion_lab.report.words import Fact, way_in
from diffusion_lab.runs.results import (
    OWN,
    Record,
    Sampling,
    common_metrics,
    differing,
    metrics_by,
    samplings_of,
    way_of,
)

COLUMNS = [
    *("run", "arm", "data", "seed", "sampling_seed", "metric", "protocol", "fingerprint"),
    *("sampling", "images", "seconds", "flops", "value", "at_end"),
]
COSTS = ("images_seen", "parameters", "macs", "training_seconds", "training_images")
LOSSES = {  # names in summaries
    quantity.TEST_LOSS.name: "test/loss",
    quantity.VALIDATION_LOSS.name: "val/loss",
    quantity.BITS_PER_CODE.name: f"test/{quantity.BITS_PER_CODE.name}",
}
DENOISING = (  # metrics whose values compare only for equal objectives on equal data
    *(quantity.TEST_LOSS.name, quantity.VALIDATION_LOSS.name, "test_by_level", "val_by_level"),
)
INFINITY, FEWEST = "fid_infinity", 2560  # samples for an extrapolation of FID with 1,280 features


@dataclass(frozen=True)
class Collection:
    """Runs that were measured by one protocol and sampling; `names` are the metrics' full names.

    `study` is the protocol that all runs share, which may be empty. `ways` are the samplings by
    which all runs were measured, as the frame names them, the one that is compared first, and
    `seeds` those of its samples. `omitted` has a fact on each metric that is left out, `left_out`
    on each run.
    """

    arms: list[Arm]
    frame: pd.DataFrame
    names: dict[str, str]
    metrics: dict[str, quantity.Quantity]
    protocol: quantity.Protocol
    sampling: Sampling
    study: dict[str, Any]
    ways: list[str]
    seeds: list[int | str]
    omitted: list[Fact]
    left_out: list[Fact]

    @property
    def runs(self) -> list[Run]:
        return runs_of(self.arms)

    def ends(self, way: str | None = None) -> pd.DataFrame:
        """The numbers at the end of runs by a sampling, that which is compared by default."""
        return self.frame[self.frame.at_end & self.frame.sampling.isin(["", way or self.ways[0]])]

    def values(self, metric: str, way: str | None = None) -> pd.DataFrame:
        """The value of each run, by arm and seed: the mean over its sampling seeds."""
        ends = self.ends(way)
        runs = ends[ends.metric == metric].groupby(["arm", "data", "seed"], sort=False)
        return runs.value.mean().reset_index()

    def judged_values(self, metric: str, way: str | None = None) -> pd.DataFrame:
        """The values by which a metric is judged: of the protocol's seeds, if it is its metric.

        All seeds count if no run has one of the protocol, as in tuning runs. Arms are named without
        the part of the data.
        """
        found = self.values(metric, way)
        seeds = self.study.get("seeds", ()) if metric == self.study.get("metric") else ()
        if found.seed.isin(seeds).any():
            found = found[found.seed.isin(seeds)]
        return found.assign(arm=found.arm.map({arm.name: arm.line for arm in self.arms}))

    @cached_property
    def resampled(self) -> set[str]:
        """The metrics that were measured by another sampling than the one compared first, too."""
        return {*self.frame[self.frame.sampling.isin(self.ways[1:])].metric}

    def real(self, metric: str) -> float | None:
        """The value of a metric for as many real images as samples; None if not measured."""
        found = self.values(f"{metric}{quantity.REAL}").value
        both = (self.names.get(name, "") for name in (metric, f"{metric}{quantity.REAL}"))
        as_many = len({name.partition("/")[2] for name in both}) == 1
        return float(found.iloc[0]) if as_many and not found.empty else None

    @cached_property
    def judged(self) -> list[quantity.Quantity]:
        """The metrics by which arms are judged, the one of the protocol first."""
        have = set(self.ends().metric)
        found = [each for each in self.metrics.values() if each.judged and each.name in have]
        return sorted(found, key=lambda metric: metric.name != self.study.get("metric"))


def results(*paths: str | Path) -> pd.DataFrame:
    """Every number of the finished runs at or below the paths, in a frame of a row for each.

    Its columns are the run, its arm and data, the training seed and the sampling seed, the metric
    with the protocol and the sampling by which it was measured, the images, seconds and FLOPs of
    the training up to there, and the value. `at_end` is false for what was measured on the way.
    Nothing is left out for being measured otherwise: choose by `protocol` and `sampling`.
    """
    runs, left_out = records.read(records.run_folders(paths))
    for fact in left_out:
        say(f"{fact}.")
    rows: list[tuple] = []
    for arm in grouped(runs)[0]:
        for run in arm.runs:
            known = [*run.kept, *records.counted(run)]
            ways = [way_in(each["sampling"]) for each in known]
            on_the_way = [name for name in run.summary.metrics if name not in LOSSES.values()]
            rows += _rows(arm, run, zip(known, ways, strict=True), on_the_way, {})
    return pd.DataFrame(rows, columns=COLUMNS)


def collect(paths: Sequence[str | Path]) -> Collection:
    """Collects the arms at or below `paths`; raises UserError for none, or unlike protocols."""
    runs, left_out = _read(paths)
    study = _study_of(runs)
    runs = _with_own_ways(runs, study)
    protocol, sampling, measured = common_metrics({run.folder: run.kept for run in runs})
    names: dict[str, str] = {}
    # of several, as with two classifiers, the most common name counts
    for name, _ in Counter(name for each in measured.values() for name in each).most_common():
        names.setdefault(name.partition("/")[0], name)
    copied, omitted = records.copies(runs, sampling)
    if int(protocol["num_samples"]) < FEWEST and names.pop(INFINITY, ""):
        omitted.append(Fact("few_for_infinity", samples=protocol["num_samples"], fewest=FEWEST))
    arms, repeated = grouped(runs)
    labels = _samplings(runs, protocol, sampling, study)
    rows: list[tuple] = []
    for arm in arms:
        for run in arm.runs:
            # training may have measured in another way than the one that is compared
            own = run.summary.protocol == protocol and run.summary.sampling
            on_the_way = names.values() if own and sampling in run.ways(own) else ()
            known = _measured(run, protocol, labels, names)
            rows += _rows(arm, run, known, on_the_way, copied.get(run.folder, {}))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    if not losses_compare(runs):
        frame = frame[~frame.metric.isin(DENOISING)]
        omitted.append(Fact("losses_differ"))
    finite = np.isfinite(frame.value)
    for run, lost in frame[~finite & frame.at_end].groupby("run", sort=False).metric:
        omitted.append(Fact("not_finite", run=run, metrics=[*dict.fromkeys(lost)]))
    controls = dict.fromkeys(name for own in copied.values() for name in own)
    frame, quantities = frame[finite], records.quantities(runs, controls)
    seeds: list[Any] = [way["seed"] for way in next(iter(labels.values())) if way]
    if (wanted := study.get("sampling_seeds")) and seeds != wanted:
        by = [sampling | {"seed": seed} for seed in wanted]
        lacking = [r.folder for r in runs if not all(metrics_by(r.kept, protocol, b) for b in by)]
        omitted.append(Fact("lacking_seeds", seeds=wanted, runs=lacking))
    measured_by = protocol, sampling, study, [*labels], seeds
    found = Collection(arms, frame, names, quantities, *measured_by, omitted, left_out + repeated)
    # by the size of the data, then by the metric that decides, the best mean first
    decides = study.get("metric", "fid")
    means = found.values(decides).groupby("arm").value.mean()
    if decides in quantities and quantities[decides].higher_is_better:
        means = -means
    sizes = [*dict.fromkeys(arm.data for arm in arms)]
    arms.sort(key=lambda arm: (sizes.index(arm.data), means.get(arm.name, math.inf)))
    return found


def _rows(
    arm: Arm,
    run: Run,
    measured: Iterable[tuple[Record, str]],
    on_the_way: Iterable[str],
    copied: Mapping[str, float],
) -> Iterator[tuple]:
    """Yields the costs, losses and copies of a run, its evaluations, and what training measured."""
    place = (run.folder, arm.name, arm.data, run.seed)
    images, flops = run.summary.images_seen, run.summary.flops
    end = (images, run.summary.training_seconds, flops(images))
    known = {name: run.summary.metrics.get(key) for name, key in LOSSES.items()}
    known |= {name: getattr(run.summary, name) for name in COSTS}
    known |= {"peak_memory": run.summary.peak_memory_bytes}
    known |= {"images_per_second": run.images_per_second, **copied}
    for name, value in known.items():
        if value is not None:
            yield (*place, None, name, "", "", "", *end, float(value), True)
    for record, sampling in measured:
        seed = record["sampling"].get("seed")
        seed = run.seed if seed == OWN else seed
        for full, value in record["metrics"].items():
            name, _, protocol = full.partition("/")
            by = (protocol, record["protocol"].get(quantity.FINGERPRINT, ""), sampling)
            if full not in LOSSES.values():
                yield (*place, seed, name, *by, *end, float(value), True)
    wanted = {full: full.partition("/")[0] for full in on_the_way}
    wanted["val/loss"] = quantity.VALIDATION_LOSS.name
    rows = [row for row in run.rows if {"images", "seconds"} <= row.keys()]
    # an evaluation writes its own row when it ends: the first one of a step says when it began
    reached = {row["images"]: row["seconds"] for row in reversed(rows)}
    for row in rows:
        for full, name in wanted.items():
            when = (row["images"], reached[row["images"]], flops(row["images"]))
            by = (full.partition("/")[2], "", "")
            if full in row:
                yield (*place, None, name, *by, *when, float(row[full]), False)


def _measured(
    run: Run,
    protocol: quantity.Protocol,
    samplings: Mapping[str, Sequence[Sampling]],
    names: Mapping[str, str],
) -> Iterator[tuple[Record, str]]:
    """Yields the metrics of these names, and the seconds of a sample, by samplings and labels."""
    for label, by in ((label, each) for label, own in samplings.items() for each in own):
        found = metrics_by(run.kept, protocol, by)
        metrics = {name: found[name] for name in names.values() if name in found}
        for record in run.kept:
            if record.get("sampling_seconds") and record["metrics"].items() <= found.items():
                metrics.setdefault("sampling_seconds", record["sampling_seconds"])
        yield {"metrics": metrics, "protocol": protocol, "sampling": by}, label


def _read(paths: Sequence[str | Path]) -> tuple[list[Run], list[Fact]]:
    """The runs at or below the paths, and facts on those that are left out."""
    folders = records.run_folders(paths)
    say(f"{len(folders)} run folders")
    runs, left_out = records.read(folders)
    if not runs:
        raise UserError(f"there is nothing to compare: {'; '.join(map(str, left_out))}")
    others = [run.kept for run in runs if run.family != AUTOENCODER]
    known = [record["protocol"] for own in others for record in own]
    kept = []
    for run in runs:
        # an autoencoder counts if its samples were measured as those of another run
        alike = not known or any(record["protocol"] in known for record in run.kept)
        if alike or run.family != AUTOENCODER:
            kept.append(run)
        else:
            left_out.append(Fact("measured_otherwise", run=run.folder))
    return kept, left_out


def _study_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The protocol of all runs that may have one, for the seeds of all; empty if others differ."""
    ours = [run for run in runs if run.family != AUTOENCODER and not run.drawn_elsewhere]
    found = [run.part("protocol") for run in ours]
    rules = [{key: each[key] for key in each if key != "seeds"} for each in found]
    if not found or not all(found) or any(each != rules[0] for each in rules):
        return {}
    return rules[0] | {"seeds": sorted({seed for each in found for seed in each["seeds"]})}


def _with_own_ways(runs: Sequence[Run], study: Mapping[str, Any]) -> list[Run]:
    """The runs, with records that say in which way each is drawn, if ways may differ."""
    if study.get("sampling") == OWN:
        return [run if run.drawn_elsewhere else run.drawn_in(run.own_way) for run in runs]
    ours = [run for run in runs if not run.drawn_elsewhere]
    families = dict.fromkeys(run.family for run in ours)
    if len(families) < 2:
        return list(runs)
    ways = {}  # families have no sampler in common, so each has a way of its own
    for family in families:
        _, sampling, _ = common_metrics({r.folder: r.kept for r in ours if r.family == family})
        ways[family] = way_of(sampling)
    return [run if run.drawn_elsewhere else run.drawn_in(ways[run.family]) for run in runs]


def _samplings(
    runs: Sequence[Run], protocol: quantity.Protocol, sampling: Sampling, study: Mapping[str, Any]
) -> dict[str, list[Sampling]]:
    """The samplings by which all runs were measured, `sampling` first, by what differs in them.

    Each stands for that by every sampling seed of the protocol, if all runs have each.
    """

    def by_all(way: Sampling) -> bool:
        return all(metrics_by(run.kept, protocol, way) for run in runs)

    alike = [record for run in runs for record in run.kept if record["protocol"] == protocol]
    known = {json.dumps(way, sort_keys=True) for record in alike for way in samplings_of(record)}
    ways = [
        way
        for way in map(json.loads, sorted(known))
        if way != sampling and way["seed"] == sampling["seed"] and by_all(way)
    ]
    found = {}
    for way in (sampling, *ways):
        own, others = flat(way), [flat(other) for other in (sampling, *ways)]
        keys = sorted({key for other in others for key in differing(own, other)})
        label = " ".join(f"{key}={own.get(key)}" for key in keys) or way_in(way)
        seeds: list[Sampling] = [way | {"seed": n} for n in study.get("sampling_seeds") or []]
        found[label] = seeds if seeds and all(map(by_all, seeds)) else [way]
    return found


def losses_compare(runs: Iterable[Run]) -> bool:
    """Whether the denoising losses of all runs measure the same quantity."""
    decisive = Means.LOSS | Means.IDENTITY  # paths do not count: the same images may lie elsewhere
    known = [
        {key: value for key, value in run.known.items() if decisive in means(key)}
        for run in runs
        if not run.drawn_elsewhere
    ]
    return all(each == known[0] for each in known)
