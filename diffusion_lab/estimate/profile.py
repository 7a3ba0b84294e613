"""Profiles compositions: tables of what they cost and how fast they are on this device."""

from dataclasses import asdict
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from diffusion_lab.assembly.config_keys import Means, groups
from diffusion_lab.assembly.costs import (
    ELSEWHERE,
    ImageFacts,
    RunCost,
    counted,
    image_facts,
    sampling_calls,
)
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.sentences import Combination
from diffusion_lab.backbone.macs import TRAINING_PASSES, Cost, by_level, total
from diffusion_lab.common.formats import amount
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import whole
from diffusion_lab.diffusion.objective import TeacherModel
from diffusion_lab.estimate import budget
from diffusion_lab.estimate.activations import activations
from diffusion_lab.estimate.bench import ALLOWED, Bench, measured_on, median_seconds, peak_flops
from diffusion_lab.runs.opened import inherited, load_diffusion_config

COLUMNS = {
    "params": "params",
    "MACs": "macs",
    "calls": "sampling_calls",
    "bytes": "activation_bytes",
    "train/s": "training_images_per_second",
    "draw/s": "sampling_images_per_second",
}
KINDS = ("training", "network")  # of speeds
Numbers = dict[str, Any]


def profile(
    cfg: DictConfig, overrides: list[str], combinations: list[Combination]
) -> dict[str, object]:
    """Profiles one composition, or several side by side; returns the results.

    All are counted, or refused if they cannot work, before the first is timed.
    """
    title = cfg.run or f"backbone={HydraConfig.get().runtime.choices['backbone']}"
    completed = [prepared(each.cfg, each.overrides) for each in combinations]
    facts = [image_facts(each) for each in completed]
    counts = [
        counted(each, about, sampling_calls(each, about))
        for each, about in zip(completed, facts, strict=True)
    ]
    results = [
        numbers_of(cost, about)
        | (measured(own, about, cost) if own.speed and own.device != "meta" else {})
        for own, about, cost in zip(completed, facts, counts, strict=True)
    ]
    for each, cost, numbers in zip(combinations, counts, results, strict=True):
        show(each.name or title, cost, numbers, each.cfg.depth)
    if len(results) > 1:
        compare([each.name for each in combinations], results)
    return {"profiles": results} if combinations[0].chosen else results[0]


def prepared(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """A configuration completed by its budget, or its run; raises UserError for a wrong one."""
    if not cfg.run:
        cfg = budget.with_budget(cfg, overrides)
    check_keys(cfg, ALLOWED | {"depth": whole(1)})
    if cfg.run:
        cfg = inherited(
            cfg, load_diffusion_config(cfg.run), ("data", *groups(Means.COST)), overrides
        )
    device, _ = measured_on(cfg)  # raises UserError for a wrong device or precision
    asked = str(OmegaConf.select(cfg, "objective.teacher._target_"))
    if cfg.speed and device.type != "meta" and asked.endswith(f".{TeacherModel.__name__}"):
        raise UserError(
            "objective/teacher=model is a second network that every step asks, which profile does "
            "not time; write speed=false, or ask `diffusion-lab doctor`, which does"
        )
    return cfg


def numbers_of(cost: RunCost, facts: ImageFacts) -> Numbers:
    """The numbers that need no device."""
    return {
        "image_shape": facts.shape,
        "num_classes": facts.labels.classes,
        "params": cost.parameters,
        "macs": cost.macs,
        "training_macs": round(cost.training_share * cost.macs),
        "flops": cost.flops(),
        "flop_counter": cost.seen_flops,
        "sampling_calls": cost.calls,
        "modules": [asdict(each) for each in cost.modules],
    }


def measured(cfg: DictConfig, facts: ImageFacts, cost: RunCost) -> Numbers:
    """How fast a composition is on a device, and how near to the device's peak."""
    device, precision = measured_on(cfg)
    bench = Bench(cfg, facts, device, precision)
    bench.compile(cfg.compile)
    step, call = (median_seconds([work], cfg.timed_steps)[0] for work in (bench.train, bench.call))
    peak = peak_flops(precision, device)
    work = cfg.batch_size * cost.flops() / peak  # seconds that a call takes at the peak
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "batch_size": cfg.batch_size,
        "activation_bytes": activations(cfg, facts, precision).kept.per_image,
        "training_images_per_second": cfg.batch_size / step,
        "network_images_per_second": cfg.batch_size / call,
        "sampling_images_per_second": cfg.batch_size / call / cost.calls if cost.calls else None,
        "peak_flops": peak,
        "training_share_of_peak": TRAINING_PASSES * cost.training_share * work / step,
        "network_share_of_peak": work / call,
    }


def show(name: str, cost: RunCost, numbers: Numbers, depth: int) -> None:
    """Prints the table of modules, and a few lines on the entire model."""
    shape = "x".join(map(str, numbers["image_shape"]))
    table = Table("module", title=f"{name} on {shape}, {numbers['num_classes']} classes")
    for column in ("parameters", "share", "MACs", "share"):
        table.add_column(column, justify="right")
    rows = by_level(cost.modules, depth)
    for row in rows:
        table.add_row(row.name, *_cells(row, cost))
    table.add_section()
    table.add_row("all", *_cells(total(rows), cost))
    console.print(table)
    say(
        f"{amount(cost.macs)} MACs, {amount(cost.flops())} FLOPs; "
        f"PyTorch counts {amount(cost.seen_flops)}"
    )
    if cost.training_share != 1:
        say(f"In training: {amount(numbers['training_macs'])} MACs, as patches are routed")
    if cost.calls is not None:
        say(f"Network calls per sample: {cost.calls:,}")
    if any(module.name == ELSEWHERE for module in cost.modules):
        say(
            f"MACs {ELSEWHERE} were seen by PyTorch but counted by no module; add a method "
            "mixing_macs(*forward_inputs) to the module that multiplies outside of its layers"
        )
    if "device" in numbers:
        show_speed(numbers)


def show_speed(numbers: Numbers) -> None:
    """Prints how fast training and sampling are."""
    say(
        "On {device} in {precision}, batch {batch_size}; peak ".format(**numbers)
        + f"{amount(numbers['peak_flops'])} FLOP/s in matrix products and convolutions"
    )
    shares = {kind: f"{numbers[f'{kind}_share_of_peak']:.0%} of the peak" for kind in KINDS}
    rates = {kind: amount(numbers[f"{kind}_images_per_second"]) for kind in KINDS}
    say(f"Training: {rates['training']} images/s, {shares['training']}")
    say(f"Activations: {amount(numbers['activation_bytes'])} bytes per image")
    say(f"A network call: {rates['network']} images/s, {shares['network']}")
    if speed := numbers["sampling_images_per_second"]:
        say(f"Sampling: {amount(speed)} images/s")


def compare(names: list[str], results: list[Numbers]) -> None:
    """Prints one table, a row per composition, with the columns that were measured for all."""
    columns = {t: key for t, key in COLUMNS.items() if all(key in each for each in results)}
    caption = "bytes: activations per image; train/s, draw/s: images per second"
    table = Table("composition", caption=caption if "bytes" in columns else None)
    for title in columns:
        table.add_column(title, justify="right")
    for name, numbers in zip(names, results, strict=True):
        values = [numbers[key] for key in columns.values()]
        table.add_row(name, *(amount(v) if isinstance(v, int | float) else "" for v in values))
    console.print(table)


def _cells(row: Cost, cost: RunCost) -> list[str]:
    params, macs = row.params / max(cost.parameters, 1), row.macs / max(cost.macs, 1)
    return [amount(row.params), f"{params:.1%}", amount(row.macs), f"{macs:.1%}"]
