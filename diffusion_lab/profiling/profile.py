"""Profiles compositions: tables of what they cost and how fast they are on this device."""

from dataclasses import asdict, dataclass

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from diffusion_lab.backbone.macs import Cost, by_level, total
from diffusion_lab.build.config_keys import Means, groups
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.build.overrides import Combination
from diffusion_lab.common.formats import amount
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import whole
from diffusion_lab.diffusion.objective import TeacherModel
from diffusion_lab.profiling import budget
from diffusion_lab.profiling.costs import ELSEWHERE, Counts, count, image_facts
from diffusion_lab.profiling.timing import ALLOWED, Speed, measure_speed, measured_on
from diffusion_lab.runs.opened import inherit, load_diffusion_config

COLUMNS = {
    "params": "params",
    "MACs": "macs",
    "calls": "sampling_calls",
    "bytes": "activation_bytes",
    "train/s": "training_images_per_second",
    "draw/s": "sampling_images_per_second",
}


@dataclass(frozen=True)
class Profile:
    """The costs of a composition; `speed` is None if it is not measured."""

    name: str
    counts: Counts
    speed: Speed | None

    def as_dict(self) -> dict[str, object]:
        """The numbers of counts and speed by name."""
        return asdict(self.counts) | (asdict(self.speed) if self.speed else {})


def profile(
    cfg: DictConfig, overrides: list[str], combinations: list[Combination]
) -> dict[str, object]:
    """Profiles one composition, or several side by side; returns the results.

    All are counted, or refused if they cannot work, before the first is timed.
    """
    own = cfg.run or f"backbone={HydraConfig.get().runtime.choices['backbone']}"
    for each in combinations:
        prepare(each.cfg, each.overrides)
    counted = [count(each.cfg, image_facts(each.cfg)) for each in combinations]
    profiles = []
    for each, counts in zip(combinations, counted, strict=True):
        speed = measure_speed(each.cfg, counts) if each.cfg.speed else None
        name = " ".join(f"{key}={value}" for key, value in each.chosen.items()) or own
        profiles.append(Profile(name, counts, speed))
    for each, result in zip(combinations, profiles, strict=True):
        show(result, each.cfg.depth)
    if len(profiles) > 1:
        compare(profiles)
    results = [result.as_dict() for result in profiles]
    return {"profiles": results} if combinations[0].chosen else results[0]


def prepare(cfg: DictConfig, overrides: list[str]) -> None:
    """Completes a configuration by its budget, or by its run; raises UserError for a wrong one."""
    if not cfg.run:
        budget.apply(cfg, overrides)
    check_keys(cfg, ALLOWED | {"depth": whole(1)})
    if cfg.run:
        inherit(cfg, load_diffusion_config(cfg.run), ("data", *groups(Means.COST)), overrides)
    device, _ = measured_on(cfg)  # raises UserError for a wrong device or precision
    asked = str(OmegaConf.select(cfg, "objective.teacher._target_"))
    if cfg.speed and device.type != "meta" and asked.endswith(f".{TeacherModel.__name__}"):
        raise UserError(
            "objective/teacher=model is a second network that every step asks, which profile does "
            "not time; write speed=false, or ask `diffusion-lab doctor`, which does"
        )


def show(profile: Profile, depth: int) -> None:
    """Prints the table of modules, and a few lines on the entire model."""
    counts, speed = profile.counts, profile.speed
    shape = "x".join(str(side) for side in counts.image_shape)
    table = Table("module", title=f"{profile.name} on {shape}, {counts.num_classes} classes")
    for column in ("parameters", "share", "MACs", "share"):
        table.add_column(column, justify="right")
    rows = by_level(counts.modules, depth)
    for row in rows:
        table.add_row(row.name, *_cells(row, counts))
    table.add_section()
    table.add_row("all", *_cells(total(rows), counts))
    console.print(table)
    say(
        f"{amount(counts.macs)} MACs, {amount(counts.flops)} FLOPs; "
        f"PyTorch counts {amount(counts.flop_counter)}"
    )
    if counts.sampling_calls is not None:
        say(f"Network calls per sample: {counts.sampling_calls:,}")
    if any(module.name == ELSEWHERE for module in counts.modules):
        say(
            f"MACs {ELSEWHERE} were seen by PyTorch but counted by no module; add a method "
            "mixing_macs(*forward_inputs) to the module that multiplies outside of its layers"
        )
    if speed:
        show_speed(speed)


def show_speed(speed: Speed) -> None:
    """Prints how fast training and sampling are."""

    def images(per_second: float) -> str:
        return f"{amount(per_second)} images/s"

    say(
        f"On {speed.device} in {speed.precision}, batch {speed.batch_size}; "
        f"peak {amount(speed.peak_flops)} FLOP/s in matrix products and convolutions"
    )
    trained, called = speed.training_images_per_second, speed.network_images_per_second
    say(f"Training: {images(trained)}, {speed.training_share_of_peak:.0%} of the peak")
    say(f"Activations: {amount(speed.activation_bytes)} bytes per image")
    say(f"A network call: {images(called)}, {speed.network_share_of_peak:.0%} of the peak")
    if speed.sampling_images_per_second is not None:
        say(f"Sampling: {images(speed.sampling_images_per_second)}")


def compare(profiles: list[Profile]) -> None:
    """Prints one table, a row per composition, with the columns that were measured for all."""
    numbers = [profile.as_dict() for profile in profiles]
    columns = {t: key for t, key in COLUMNS.items() if all(key in each for each in numbers)}
    caption = "bytes: activations per image; train/s, draw/s: images per second"
    table = Table("composition", caption=caption if "bytes" in columns else None)
    for title in columns:
        table.add_column(title, justify="right")
    for profile, each in zip(profiles, numbers, strict=True):
        values = [each[key] for key in columns.values()]
        table.add_row(
            profile.name, *(amount(v) if isinstance(v, int | float) else "" for v in values)
        )
    console.print(table)


def _cells(row: Cost, counts: Counts) -> list[str]:
    params, macs = row.params / max(counts.params, 1), row.macs / max(counts.macs, 1)
    return [amount(row.params), f"{params:.1%}", amount(row.macs), f"{macs:.1%}"]
