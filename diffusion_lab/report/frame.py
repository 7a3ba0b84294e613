"""The numbers of runs as one long frame: a row for each value, and how it was measured."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from diffusion_lab.assembly.config_keys import Means, flat, means
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.metrics.quantity import (
    BITS_PER_CODE,
    FINGERPRINT,
    REAL,
    TEST_LOSS,
    VALIDATION_LOSS,
    Protocol,
    Quantity,
)
from diffusion_lab.report import records
from diffusion_lab.report.arms import Arm, grouped, runs_of
from diffusion_lab.report.records import AUTOENCODER, Run
from diffusion_lab.report.words import Fact, way_in
from diffusion_lab.runs import published
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
CODES = f"test/{BITS_PER_CODE.name}"
LOSSES = {  # names in summaries
    TEST_LOSS.name: "test/loss",
    VALIDATION_LOSS.name: "val/loss",
    BITS_PER_CODE.name: CODES,
}
METRIC = COLUMNS.index("metric")
INFINITY, FEWEST = "fid_infinity", 2560  # samples for an extrapolation of FID with 1,280 features


@dataclass(frozen=True)
class Collection:
    """Runs that were measured by one protocol and sampling; `names` are the metrics' full names.

    `study` is the protocol that all runs share, which may be empty. `ways` are the samplings by
    which all runs were measured, as the frame names them, the one that is compared first.
    `omitted` has a fact on each metric that is left out, `left_out` on each run.
    """

    arms: list[Arm]
    frame: pd.DataFrame
    names: dict[str, str]
    metrics: dict[str, Quantity]
    protocol: Protocol
    sampling: Sampling
    study: dict[str, Any]
    ways: list[str]
    omitted: list[Fact]
    left_out: list[Fact]

    @property
    def runs(self) -> list[Run]:
        return runs_of(self.arms)

    def ends(self, way: str | None = None) -> pd.DataFrame:
        """The numbers at the end of runs by a sampling, that which is compared by default."""
        return self._by_way[way or self.ways[0]]

    @cached_property
    def _by_way(self) -> dict[str, pd.DataFrame]:
        ends = self.frame[self.frame.at_end]
        return {way: ends[ends.sampling.isin(["", way])] for way in self.ways}

    @cached_property
    def _real(self) -> dict[str, float]:
        real = self.frame[self.frame.metric.str.endswith(REAL)]
        return real.groupby("metric").value.first().to_dict()

    def values(self, metric: str, way: str | None = None) -> pd.DataFrame:
        """The value of each run, by arm and seed: the mean over its sampling seeds."""
        ends = self.ends(way)
        keys = ["arm", "data", "seed"]
        return ends[ends.metric == metric].groupby(keys, sort=False).value.mean().reset_index()

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

    def real(self, metric: str) -> float | None:
        """The value of a metric for real images in place of samples; None if not measured."""
        return self._real.get(f"{metric}{REAL}")

    @cached_property
    def judged(self) -> list[Quantity]:
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
    arms, _ = grouped(runs)
    rows: list[tuple] = []
    for arm in arms:
        for run in arm.runs:
            rows += _rows_of_run(arm, run)
            rows += _rows_in_training(arm, run, {})
            for record in run.kept:
                rows += _rows_of_record(arm, run, record, way_in(record["sampling"]))
    return pd.DataFrame(rows, columns=COLUMNS)


def collect(paths: Sequence[str | Path]) -> Collection:
    """Collects the arms at or below `paths`.

    Raises UserError if there are none, if they were measured in different ways, or if one of the
    paths is a published folder that was changed.
    """
    for path in map(Path, paths):
        published.require_whole(path)
    folders = records.run_folders(paths)
    say(f"{len(folders)} run folders")
    runs, left_out = records.read(folders)
    if not runs:
        raise UserError(f"there is nothing to compare: {'; '.join(map(str, left_out))}")
    runs, measured_else = _of_one_protocol(runs)
    study = study_of(runs)
    runs = _with_own_ways(runs, study)
    protocol, sampling, measured = common_metrics({run.folder: run.kept for run in runs})
    names = full_names(measured.values())
    copied, omitted = records.copies(runs, sampling)
    skipped = () if losses_compare(runs) else (TEST_LOSS.name, VALIDATION_LOSS.name)
    if skipped:
        omitted.append(Fact("losses_differ"))
    if int(protocol["num_samples"]) < FEWEST and INFINITY in names:
        del names[INFINITY]
        omitted.append(Fact("few_for_infinity", samples=protocol["num_samples"], fewest=FEWEST))
    arms, repeated = grouped(runs)
    ways = [sampling, *_other_ways(runs, protocol, sampling)]
    labels = [_label(way, ways) for way in ways]
    seeds = [sampling_seeds(runs, protocol, way, study) for way in ways]
    rows: list[tuple] = []
    for arm in arms:
        for run in arm.runs:
            in_training = names if _as_in_training(run, protocol, sampling) else {}
            own = [*_rows_of_run(arm, run), *_rows_in_training(arm, run, in_training)]
            rows += [row for row in own if row[METRIC] not in skipped]
            rows += [_row(arm, run, *each) for each in copied.get(run.folder, {}).items()]
            for label, way, several in zip(labels, ways, seeds, strict=True):
                for seed in several:
                    rows += _rows_by(arm, run, protocol, way | seed, names, label)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    finite = frame.value.map(math.isfinite)
    for run, lost in frame[~finite & frame.at_end].groupby("run", sort=False).metric:
        omitted.append(Fact("not_finite", run=run, metrics=[*dict.fromkeys(lost)]))
    metrics = records.quantities(runs) | _controls(copied)
    said = [*left_out, *measured_else, *repeated]
    ordered = _ordered(arms, frame[finite], study.get("metric", "fid"))
    measured_by = (protocol, sampling, study, labels)
    return Collection(ordered, frame[finite], names, metrics, *measured_by, omitted, said)


def _as_in_training(run: Run, protocol: Protocol, sampling: Sampling) -> bool:
    """Whether a run's training measured metrics in the way that is compared."""
    known = run.summary
    return bool(
        known.sampling and known.protocol == protocol and sampling in run.ways(known.sampling)
    )


def _rows_by(
    arm: Arm, run: Run, protocol: Protocol, way: Sampling, names: Mapping[str, str], label: str
) -> Iterator[tuple]:
    """Yields the metrics of a run by one protocol and sampling, and the seconds of a sample."""
    found = metrics_by(run.kept, protocol, way)
    record = {"metrics": found, "protocol": protocol, "sampling": way}
    for row in _rows_of_record(arm, run, record, label):
        if names.get(row[METRIC]) == f"{row[METRIC]}/{row[METRIC + 1]}":
            yield row
    drawn = [each for each in run.kept if each["metrics"].items() <= found.items()]
    seconds = [each["sampling_seconds"] for each in drawn if each.get("sampling_seconds")]
    for each in seconds[:1]:
        row = _row(arm, run, "sampling_seconds", each)
        yield (*row[: METRIC + 3], label, *row[METRIC + 4 :])


def _row(arm: Arm, run: Run, metric: str, value: float) -> tuple:
    """A row of a number that belongs to the end of a run, whatever its sampling."""
    images, seconds = run.summary.images_seen, run.summary.training_seconds
    flops = run.summary.flops(images)
    place = (run.folder, arm.name, arm.data, run.seed, None)
    return (*place, metric, "", "", "", images, seconds, flops, float(value), True)


def _rows_of_run(arm: Arm, run: Run) -> list[tuple]:
    """The costs and the losses of a run."""
    known = {name: run.summary.metrics.get(key) for name, key in LOSSES.items()}
    known |= {name: getattr(run.summary, name) for name in COSTS}
    known |= {"peak_memory": run.summary.peak_memory_bytes}
    known |= {"images_per_second": run.images_per_second}
    return [_row(arm, run, name, value) for name, value in known.items() if value is not None]


def _rows_of_record(arm: Arm, run: Run, record: Record, sampling: str) -> Iterator[tuple]:
    """Yields the metrics of an evaluation."""
    for name, value in record["metrics"].items():
        metric, _, protocol = name.partition("/")
        row = _row(arm, run, metric, value)
        seed = record["sampling"].get("seed")
        seed = run.seed if seed == OWN else seed
        fingerprint = record["protocol"].get(FINGERPRINT, "")
        if name not in LOSSES.values():
            yield (*row[: METRIC - 1], seed, metric, protocol, fingerprint, sampling, *row[9:])


def _rows_in_training(arm: Arm, run: Run, names: Mapping[str, str]) -> Iterator[tuple]:
    """Yields what was measured on the way, at the seconds of the first row of a step.

    An evaluation writes its own row when it ends. `names` are the full names of metrics.
    """
    wanted = {full: name for name, full in names.items()} | {"val/loss": VALIDATION_LOSS.name}
    reached: dict[int, float] = {}
    rows = [row for row in run.rows if {"images", "seconds"} <= row.keys()]
    for row in rows:
        reached[row["images"]] = min(row["seconds"], reached.get(row["images"], math.inf))
    for row in rows:
        for name in wanted.keys() & row.keys():
            images = row["images"]
            place = (run.folder, arm.name, arm.data, run.seed, None, wanted[name])
            when = (images, reached[images], run.summary.flops(images))
            yield (*place, name.partition("/")[2], "", "", *when, float(row[name]), False)


def study_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The protocol of all runs; empty if some have none, or another one.

    Autoencoders, which have none, follow that of the runs beside them.
    """
    found = [run.part("protocol") for run in runs if _has_protocol(run)]
    return found[0] or {} if found and all(each == found[0] for each in found) else {}


def _has_protocol(run: Run) -> bool:
    return run.family != AUTOENCODER and not run.drawn_elsewhere


def _of_one_protocol(runs: Sequence[Run]) -> tuple[list[Run], list[Fact]]:
    """The runs without autoencoders whose samples were measured as no other run's, and facts."""
    others = [run.kept for run in runs if run.family != AUTOENCODER]
    known = [record["protocol"] for own in others for record in own]
    kept, facts = [], []
    for run in runs:
        alike = not known or any(record["protocol"] in known for record in run.kept)
        if alike or run.family != AUTOENCODER:
            kept.append(run)
        else:
            facts.append(Fact("measured_otherwise", run=run.folder))
    return kept, facts


def _with_own_ways(runs: Sequence[Run], study: Mapping[str, Any]) -> list[Run]:
    """The runs, with records that say in which way each is drawn, if ways may differ.

    They may if the runs' protocol says so, each then by its own configuration. They must if the
    runs are of several families, which have no sampler in common: each family then has one way.
    Raises UserError for a family that has none.
    """
    ours = [run for run in runs if not run.drawn_elsewhere]
    if study.get("sampling") == OWN:
        return [run if run.drawn_elsewhere else run.drawn_in(run.own_way) for run in runs]
    families = dict.fromkeys(run.family for run in ours)
    if len(families) < 2:
        return list(runs)
    ways = {}
    for family in families:
        _, sampling, _ = common_metrics({r.folder: r.kept for r in ours if r.family == family})
        ways[family] = way_of(sampling)
    return [run if run.drawn_elsewhere else run.drawn_in(ways[run.family]) for run in runs]


def sampling_seeds(
    runs: Sequence[Run], protocol: Protocol, sampling: Sampling, study: Mapping[str, Any]
) -> list[Sampling]:
    """The sampling seeds of the protocol, if all runs have each; else that of the sampling."""
    seeds: list[Sampling] = [{"seed": seed} for seed in study.get("sampling_seeds") or []]
    every = all(metrics_by(run.kept, protocol, sampling | s) for run in runs for s in seeds)
    return seeds if seeds and every else [{}]


def _other_ways(runs: Sequence[Run], protocol: Protocol, sampling: Sampling) -> list[Sampling]:
    """The samplings, beside `sampling`, by which all runs were measured."""
    alike = [record for run in runs for record in run.kept if record["protocol"] == protocol]
    ways = {json.dumps(way, sort_keys=True) for record in alike for way in samplings_of(record)}
    return [
        way
        for way in map(json.loads, sorted(ways))
        if way != sampling
        and way["seed"] == sampling["seed"]
        and all(metrics_by(run.kept, protocol, way) for run in runs)
    ]


def _label(way: Sampling, ways: Sequence[Sampling]) -> str:
    """The settings in which a sampling differs from the others; in words if there is no other."""
    own, others = flat(way), [flat(other) for other in ways if other != way]
    keys = dict.fromkeys(key for other in others for key in differing(own, other))
    return " ".join(f"{key}={own.get(key)}" for key in sorted(keys)) or way_in(way)


def full_names(measured: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """The full name of each metric, "fid" -> "fid/efficientnet_lite0-96/train10k-1k".

    If runs have several, as with two classifiers, the most common name counts.
    """
    counts = Counter(name for each in measured for name in each)
    names: dict[str, str] = {}
    for name, _ in counts.most_common():
        names.setdefault(name.partition("/")[0], name)
    return names


def losses_compare(runs: Iterable[Run]) -> bool:
    """Whether the denoising losses of all runs measure the same quantity."""
    decisive = Means.LOSS | Means.IDENTITY  # paths do not count: the same images may lie elsewhere
    known = [
        {key: value for key, value in run.known.items() if decisive in means(key)}
        for run in runs
        if not run.drawn_elsewhere
    ]
    return all(each == known[0] for each in known)


def _controls(copied: Mapping[Path, Mapping[str, float]]) -> dict[str, Quantity]:
    names = dict.fromkeys(name for own in copied.values() for name in own)
    found = {name: records.of_control(name) for name in names}
    return {name: quantity for name, quantity in found.items() if quantity}


def _ordered(arms: Sequence[Arm], frame: pd.DataFrame, metric: str) -> list[Arm]:
    """The arms by the size of their data, then by the mean of a metric, the lowest first."""
    ends = frame[frame.at_end & (frame.metric == metric)].groupby("arm").value.mean()
    sizes = list(dict.fromkeys(arm.data for arm in arms))
    return sorted(arms, key=lambda arm: (sizes.index(arm.data), ends.get(arm.name, math.inf)))
