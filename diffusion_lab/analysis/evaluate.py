"""The commands `evaluate` and `sample-sweep`: metrics of a run, by one sampling or by many."""

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table
from torch import nn

from diffusion_lab.analysis import plots
from diffusion_lab.assembly.config_keys import as_list, flattered
from diffusion_lab.assembly.instantiate import check_keys, errors_at
from diffusion_lab.assembly.pipeline import Pipeline
from diffusion_lab.assembly.pipeline.evaluation import evaluate
from diffusion_lab.assembly.sentences import Combination
from diffusion_lab.common import hashing
from diffusion_lab.common.files import make_folder, read_rows, require_writable, write_atomically
from diffusion_lab.common.formats import csv_text, markdown_table
from diffusion_lab.common.images import NotDrawn
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import optional, whole
from diffusion_lab.compute.distributed import of_all_ranks, on_rank_zero
from diffusion_lab.families.diffusion.run import DiffusionRun, open_diffusion_run
from diffusion_lab.families.images.run import open_images
from diffusion_lab.metrics import quantity
from diffusion_lab.metrics.generative import GenerativeMetrics, PreparedMetrics
from diffusion_lab.report.scaling import front
from diffusion_lab.runs.averages import name_of
from diffusion_lab.runs.current import CHECKPOINT, sha256_of
from diffusion_lab.runs.opened import inherited, open_run
from diffusion_lab.runs.results import (
    Sampling,
    comparable_metrics,
    require_evaluations,
    sampling_of,
)
from diffusion_lab.training.callbacks import sampling_seed

# the keys that combinations may vary
VARIABLE = ("sampler", "steps", "guidance", "seed", "average", "step")
SWEEPS, ROWS = "sweeps", "results.jsonl"
# keys with a plot of their own
PLOTTED = {"guidance.scale": "scale.png", "average": "average.png", "step": "step.png"}
# options of metrics that change figures, and not the protocol
CHANGING = (*quantity.ON_REQUEST, "per_class", "patch", "half_splits")
SHOWN = ("fid", "kid", "accuracy")  # the metrics in tables; results.csv has all
Chosen = dict[str, str]  # override key -> value


def evaluate_run(cfg: DictConfig, overrides: list[str]) -> dict[str, float]:
    """Measures `cfg.run`, prints its metrics and their values for real images, and saves them.

    Sampler, guidance and metrics are the run's own, unless `overrides` say otherwise. With
    `cfg.images` it measures images that another program drew, against `cfg.data`.
    """
    check_keys(cfg, {"batch_size": whole(1), "seed": optional(whole(0))})
    # refuse a wrong path at once
    others = {str(run): require_evaluations(str(run)) for run in as_list(cfg.against)}
    if cfg.images is None and "data" in cfg:
        raise UserError(
            "data=... is for images=...; a run is measured against its own data, so leave it out"
        )
    opened = open_run(cfg) if cfg.images is None else open_images(cfg)
    if cfg.images and others:
        raise UserError(
            f"against={next(iter(others))} is for runs; put images beside runs by "
            "`diffusion-lab compare`"
        )
    require_writable("run", str(cfg.run), "evaluate a copy of the run elsewhere")
    cfg = inherited(cfg, opened.saved, ("sampler", "guidance", "metrics"), overrides)
    if cfg.seed is None:
        cfg.seed = sampling_seed(opened.saved)
    pipeline = opened.pipeline(cfg)
    metrics = opened.metrics(cfg)
    protocol = metrics.protocol_of(opened.datamodule)
    # refuse incomparable runs before minutes of features and an hour of sampling
    way = (protocol, sampling_of(cfg), cfg.run)
    compared = {run: comparable_metrics(run, found, *way) for run, found in others.items()}
    with errors_at(cfg, "metrics"):
        prepared = PreparedMetrics.of(metrics, opened.datamodule)
    with opened.autocast:
        results, seconds = evaluate(pipeline, prepared, opened.datamodule, cfg.batch_size, cfg.seed)
    results = results | quantity.ceiling(results, opened.reconstruction_metrics)
    for line in quantity.report(results, opened.datamodule.class_names, metrics.extra_quantities):
        say(line)
    path = on_rank_zero(lambda: opened.record(cfg, results, protocol, metrics.extra_facts, seconds))
    say(f"Saved in {path}")
    say_if_flattered(opened.saved, cfg.metrics, metrics.extractor.name)
    if compared:
        console.print(quantity.side_by_side({cfg.run: results} | compared))
    return results


def say_if_flattered(trained: DictConfig, metrics: DictConfig, features: str) -> None:
    """Says that FID on these features flatters a run that was aligned to them, if it was."""
    if flattered(trained, metrics):
        say(f"The run was aligned to features of {features}: FID on them flatters it")


@dataclass(frozen=True)
class Setting:
    """One combination: the chosen overrides, the pipeline, and a key for the results."""

    chosen: Chosen
    pipeline: Pipeline
    seed: int
    key: str  # a hash of everything that the results depend on
    checkpoint: object  # the sha256 of its weights' checkpoint, or None
    sampling: Sampling

    def row(self, results: dict) -> dict:
        """Saved results with what is not theirs: another sweep may choose it by other overrides."""
        return self.chosen | results | {CHECKPOINT: self.checkpoint}  # which older rows have wrong


def sweep(
    cfg: DictConfig, overrides: list[str], combinations: list[Combination]
) -> dict[str, object]:
    """Measures each combination that is not measured yet, once all are checked; writes a table."""
    varied = list(combinations[0].chosen)
    for key in varied:
        if key.split(".")[0].split("/")[0] not in VARIABLE:
            raise UserError(
                f"{key} cannot vary in a sweep over sampling; "
                f"only {', '.join(VARIABLE)} and their values can"
            )
    check_keys(cfg, {"batch_size": whole(1)})
    models = opened_models(combinations)
    opened = models[0]
    cfg = inherited(cfg, opened.saved, ("metrics",), overrides)
    metrics = opened.metrics(cfg)
    measured = measured_by(metrics, opened)
    settings = [
        build_setting(each, model, measured)
        for each, model in zip(combinations, models, strict=True)
    ]
    with errors_at(cfg, "metrics"):
        data = opened.datamodule
        by_class = all(each.pipeline.conditional for each in settings) and data.num_classes > 0
        metrics.check(by_class, data.num_classes)
        prepared = PreparedMetrics.of(metrics, opened.datamodule)
    name = f"{metrics.extractor.name}_{prepared.reference.name}-{metrics.num_samples}"
    folder = Path(cfg.output) if cfg.output else Path(cfg.run) / SWEEPS / name
    on_rank_zero(lambda: make_folder(folder))  # fails before anything is measured
    kept = {row["key"]: row for row in on_rank_zero(lambda: read_rows(folder / ROWS))}
    say_if_flattered(opened.saved, cfg.metrics, metrics.extractor.name)
    say(f"Settings: {len(settings)}, already measured: {sum(s.key in kept for s in settings)}")
    for number, setting in enumerate(settings, 1):
        if setting.key not in kept:
            start = f"{number}/{len(settings)}  {named(setting.chosen)}"
            try:
                measured_now = measure(setting, opened, prepared, cfg.batch_size)
            except NotDrawn as error:
                say(f"{start} is left out: {error}")
                continue
            on_rank_zero(partial(append, folder, measured_now))
            kept[setting.key] = measured_now
            say(f"{start}: {figures(measured_now)}")
    rows = [setting.row(kept[setting.key]) for setting in settings if setting.key in kept]
    if not rows:
        raise UserError("no setting of the sweep could be drawn, so nothing is measured")
    return on_rank_zero(lambda: written(folder, rows, varied, metrics.extra_quantities))


def measured_by(metrics: GenerativeMetrics, opened: DiffusionRun) -> dict[str, object]:
    """The facts by which rows with other figures are told apart, as those that lack accuracy."""
    classifier = metrics.observer.classifier
    measured: dict[str, object] = {
        "protocol": metrics.protocol_of(opened.datamodule)["fingerprint"],
        "classifier": classifier.fingerprint if classifier else None,
        "extra": [each.identity() for each in metrics.extra_metrics],
    }
    values = {key: getattr(metrics, key) for key in CHANGING}
    if asked := {key: v for key, v in values.items() if v != getattr(type(metrics), key)}:
        measured["asked"] = asked
    return measured


def append(folder: Path, row: dict[str, object]) -> None:
    """Adds a row to the results in a folder."""
    with (folder / ROWS).open("a") as file:  # a new line first: the last may be cut off
        file.write(f"\n{json.dumps(row)}")


def opened_models(combinations: Sequence[Combination]) -> list[DiffusionRun]:
    """The run of each combination, opened once for each average and step of its weights."""
    models: dict[tuple, tuple[DiffusionRun, int | None]] = {}
    found = []
    for each in combinations:
        asked = (name_of(each.cfg.average), each.cfg.step)
        if asked not in models:
            models[asked] = (open_diffusion_run(each.cfg), each.cfg.step)
        opened, each.cfg.step = models[asked]
        found.append(opened)
    return found


def build_setting(
    combination: Combination, opened: DiffusionRun, measured: dict[str, object]
) -> Setting:
    """Builds the pipeline of a combination; raises UserError if it cannot be sampled."""
    cfg = combination.cfg
    check_keys(cfg, {"seed": whole(0)})
    cfg = inherited(cfg, opened.saved, ("sampler", "guidance", "metrics"), combination.overrides)
    if cfg.steps is not None:
        cfg.sampler.steps = cfg.steps
    sampling = sampling_of(cfg)
    checkpoint = opened.weights[CHECKPOINT]
    facts = {
        CHECKPOINT: checkpoint,
        **measured,
        **sampling,
        "precision": opened.precision,
        "weak": sha256_of(weak) if (weak := cfg.guidance.get("weak_run")) else None,
    }
    pipeline = opened.pipeline(cfg)
    if pipeline.classifier:
        facts["guiding"] = pipeline.classifier.fingerprint
    key = hashing.of_text(json.dumps(facts, sort_keys=True))[:16]
    return Setting(combination.chosen, pipeline, cfg.seed, key, checkpoint, sampling)


def measure(
    setting: Setting, opened: DiffusionRun, prepared: PreparedMetrics, batch_size: int
) -> dict[str, object]:
    """Measures a setting; returns network calls per sample, and every metric by its name."""
    pipeline = setting.pipeline
    asked: list[int] = []  # the number of images in each network call

    def count(network: nn.Module, inputs: tuple) -> None:
        asked.append(len(inputs[0]))

    with opened.autocast, ExitStack() as hooks:
        for denoiser in filter(None, (pipeline.denoiser, pipeline.weak)):
            hooks.enter_context(denoiser.backbone.register_forward_pre_hook(count))
        results, _ = evaluate(pipeline, prepared, opened.datamodule, batch_size, setting.seed)
    values = {name.split("/")[0]: value for name, value in results.items()}
    classifier = prepared.metrics.observer.classifier
    return {
        **values,
        "key": setting.key,
        "calls": round(sum(of_all_ranks(sum(asked))) / prepared.metrics.num_samples, 2),
        "protocol": next(iter(results)).partition("/")[2],
        "classifier": classifier.name if classifier else None,
        "sampling": setting.sampling,
        CHECKPOINT: setting.checkpoint,
    }


def named(chosen: Chosen) -> str:
    """A setting by the values that were varied."""
    return " ".join(f"{key}={value}" for key, value in chosen.items()) or "the run's sampling"


def figures(row: dict) -> str:
    """The metrics and the cost of a row of results, in words."""
    kid = f", KID {row['kid']:.4g}" if "kid" in row else ""  # statistics of a file give no KID
    return f"FID {row['fid']:.4g}{kid} in {row['calls']:g} calls"


def written(
    folder: Path, rows: list[dict], keys: list[str], extra: Sequence[quantity.Quantity]
) -> dict[str, object]:
    """Writes table.md, results.csv and plots; prints the table and the best for each budget.

    results.csv has all results, without rounding, the table's columns first. `keys` are the varied
    keys, in the order of the command line.
    """
    known = filter(None, (quantity.quantity_of(name) for name in SHOWN))
    # a metric of one's own may have no value for some samples, and none for real images
    shown = [each for each in (*known, *extra) if any(each.name in row for row in rows)]
    ordered = sorted(rows, key=lambda row: (row["calls"], row["fid"]))
    # the Pareto front of network calls and FID
    places = front([(row["calls"], row["fid"]) for row in ordered], higher_is_better=False)
    best = [ordered[place] for place in places]
    reals = [(q, rows[0].get(f"{q.name}{quantity.REAL}")) for q in shown]
    real = (f"{q.title} {q.text(value)}" for q, value in reals if value is not None)
    header = f"Protocol {rows[0]['protocol']}; real test images: {', '.join(real)}"
    head = [*keys, "calls", *(each.name for each in shown)]
    lines = []
    for row in ordered:
        values = [each.text(row[each.name]) if each.name in row else "" for each in shown]
        mark = "best for its budget" if row in best else ""
        lines.append([*(str(row[key]) for key in keys), f"{row['calls']:g}", *values, mark])
    write_atomically(folder / "table.md", f"{header}\n\n{markdown_table([*head, ''], lines)}")
    numbers = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, float))
    others = [name for name in numbers if name not in head]
    others.sort(key=lambda name: name.endswith(quantity.REAL))
    columns = [*head, *others, "protocol", "classifier", CHECKPOINT]
    results = csv_text(columns, [[row.get(name) for name in columns] for row in ordered])
    write_atomically(folder / "results.csv", results)
    for picture in PLOTTED.values():
        (folder / picture).unlink(missing_ok=True)  # of a sweep over other keys
    plots.fid_against_calls(ordered, [key for key in keys if key != "steps"], folder / "fid.png")
    for key in PLOTTED.keys() & keys:
        if all(re.fullmatch(r"[\d.]+", str(row[key])) for row in rows):
            plots.against_number(ordered, key, keys, shown, folder / PLOTTED[key])
    table = Table(*head, "", title=header)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for row in best:
        chosen = named({key: row[key] for key in keys})
        say(f"up to {row['calls']:g} network calls: {chosen}: {figures(row)}")
    say(f"Table and plot: {folder}")
    return {"folder": str(folder), "rows": ordered, "best": best}
