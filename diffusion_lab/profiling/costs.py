"""What a composition costs: parameters, multiply-accumulates (MACs), memory and time."""

import copy
from collections.abc import Callable

import torch
from omegaconf import DictConfig, ListConfig, open_dict
from rich.table import Table
from torch import Tensor, nn

from diffusion_lab.backbone import counting
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.counting import Cost
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.build.objects import Model, build_datamodule, build_model, build_pipeline
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.formats import amount
from diffusion_lab.common.progress import console, say
from diffusion_lab.common.ranges import whole
from diffusion_lab.compute.device import autocast, check_choices, pick_device, pick_precision
from diffusion_lab.diffusion.sampler import AdaptiveRungeKutta
from diffusion_lab.profiling.timing import Bench, median_seconds, peak_flops
from diffusion_lab.runs.config import load_config
from diffusion_lab.runs.opening import inherit, require_diffusion

# what decides a model's cost: of the command line, or of a run
COMPOSITION = (
    "first_stage",
    "augmentation",
    "backbone",
    "conditioning",
    "schedule",
    "objective",
    "denoiser",
    "optimizer",
    "sampler",
    "guidance",
)
ALLOWED = {"batch_size": whole(1), "timed_steps": whole(1)}
ELSEWHERE = "outside of all layers"  # multiplied, such as by attention of another library
UNSEEN_SHARE = 0.01  # of all MACs; less is rounding
Facts = tuple[tuple[int, int, int], int]  # (C, H, W) of the images, and the number of classes
Profile = dict[str, object]


class Silence(nn.Module):
    """A backbone that answers zeros, and counts the images that it is asked about."""

    condition_width = 4

    def __init__(self, in_channels: int, out_channels: int, image_size: tuple[int, int]):
        super().__init__()
        self.out_channels = out_channels
        self.asked = 0

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """x (B, C_in, H, W) -> zeros (B, C_out, H, W)."""
        self.asked += len(x)
        return x.new_zeros(len(x), self.out_channels, *x.shape[2:])


def profile(compositions: list[tuple[DictConfig, list[str]]], names: list[str]) -> list[Profile]:
    """Profiles configurations, given with their overrides; several are compared under `names`.

    All are counted, and refused if they cannot work, before the first is timed.
    """
    places, profiles = [], []
    for cfg, overrides in compositions:
        check_keys(cfg, ALLOWED | {"depth": whole(1)})
        if cfg.run:
            saved = load_config(cfg.run)
            require_diffusion(cfg.run, saved)
            inherit(cfg, saved, COMPOSITION, overrides)
        device, precision = place(cfg)
        facts = image_facts(cfg)
        places.append((cfg, facts, device, precision))
        profiles.append(counted(cfg, facts))
    for (cfg, facts, device, precision), result in zip(places, profiles, strict=True):
        if cfg.speed and device.type != "meta":
            result |= timed(cfg, facts, device, precision, result)
    for (cfg, *_), result, name in zip(places, profiles, names, strict=True):
        show(result, cfg.depth, name)
    if len(profiles) > 1:
        compare(profiles, names)
    return profiles


def place(cfg: DictConfig) -> tuple[torch.device, str]:
    """The device and the precision to measure in; raises UserError for what is not here."""
    check_choices(compile=cfg.compile, channels_last=cfg.channels_last)
    if cfg.device == "meta":
        return torch.device("meta"), "32-true"
    device = pick_device(cfg.device)
    precision = pick_precision(cfg.precision, device)
    autocast(precision, device)  # to hear now what it has to say
    return device, precision


def image_facts(cfg: DictConfig) -> Facts:
    """The images' shape and the number of classes: as configured, else the data's."""
    shape, classes = cfg.image_shape, cfg.num_classes
    if shape is None or classes is None:
        datamodule = build_datamodule(cfg)
        shape = list(datamodule.image_shape) if shape is None else shape
        classes = datamodule.num_classes if classes is None else classes
    whole = isinstance(shape, list | ListConfig) and all(isinstance(side, int) for side in shape)
    if not whole or len(shape) != 3 or min(shape) < 1:
        raise UserError(f"image_shape={shape} must be [channels,height,width], as in [3,32,32]")
    if not isinstance(classes, int) or classes < 0:
        raise UserError(f"num_classes={classes} must be a whole number of at least 0")
    return tuple(shape), classes


def model_on(device: str, cfg: DictConfig, facts: Facts) -> tuple[Model, Callable[[], object]]:
    """A model and a call of its network on one image; on "meta" neither takes memory or time."""
    model = build_model(cfg, *facts, device=device)
    x = torch.zeros(1, *model.denoiser.image_shape, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    level = model.schedule(torch.tensor([0.5]))
    return model, lambda: model.denoiser.output(x, level, labels)


def costs_of(cfg: DictConfig, facts: Facts) -> tuple[list[Cost], int]:
    """What each module costs, and the FLOPs that PyTorch sees.

    Where PyTorch sees more, what the modules leave out is a cost of its own, without a module.
    """
    model, call = model_on("meta", cfg, facts)
    try:
        costs = counting.count(model.denoiser, call)
    except RuntimeError:  # somebody's network that looks at the values of its tensors
        model, call = model_on("cpu", cfg, facts)
        costs = counting.count(model.denoiser, call)
    seen = counting.seen_flops(call)
    left_out = seen // 2 - counting.total(costs).macs
    if left_out > UNSEEN_SHARE * seen // 2:
        costs.append(Cost(ELSEWHERE, 0, left_out))
    return costs, seen


def counted(cfg: DictConfig, facts: Facts) -> Profile:
    """What needs no device: parameters, MACs, and the network calls of a sample."""
    costs, seen = costs_of(cfg, facts)
    cost = counting.total(costs)
    return {
        "image_shape": list(facts[0]),
        "num_classes": facts[1],
        "params": cost.params,
        "macs": cost.macs,
        "flops": 2 * cost.macs,
        "flop_counter": seen,
        "sampling_calls": sampling_calls(cfg, facts),
        "modules": [vars(cost) for cost in costs if cost.params or cost.macs],
    }


def sampling_calls(cfg: DictConfig, facts: Facts) -> int | None:
    """Network calls for one image, with the configured sampler and guidance.

    None for an adaptive sampler, which asks as often as the trained network makes it.
    """
    if cfg.guidance.get("weak_run"):
        raise UserError(
            "guidance.weak_run is a second network, which profile does not measure; write "
            "guidance=none, and profile the other by run=..."
        )
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.backbone = {"_target_": "diffusion_lab.profiling.costs.Silence", "_partial_": True}
    model = build_model(cfg, *facts)
    pipeline = build_pipeline(cfg, model, facts[1])
    if isinstance(pipeline.sampler, AdaptiveRungeKutta):
        return None
    with torch.inference_mode():
        denoise = pipeline.guidance.bind(model.denoiser, pipeline.labels([0]))
        pipeline.sampler(denoise, torch.randn(1, *model.denoiser.image_shape), model.schedule)
    return model.denoiser.backbone.asked


def timed(
    cfg: DictConfig, facts: Facts, device: torch.device, precision: str, counts: Profile
) -> Profile:
    """What depends on the device: memory of activations, images a second, share of the peak."""
    bench = Bench(cfg, *facts, device, precision)
    activations = bench.activation_bytes()
    bench.compile(cfg.compile)
    (step,) = median_seconds([bench.train], device, cfg.timed_steps)
    (call,) = median_seconds([bench.call], device, cfg.timed_steps)
    peak = peak_flops(precision, device)
    calls = counts["sampling_calls"]
    work = cfg.batch_size * counts["flops"] / peak  # seconds that a call takes at the peak
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "batch_size": cfg.batch_size,
        "activation_bytes": activations,
        "training_images_per_second": cfg.batch_size / step,
        "network_images_per_second": cfg.batch_size / call,
        "sampling_images_per_second": cfg.batch_size / call / calls if calls else None,
        "peak_flops": peak,
        "training_share_of_peak": counting.TRAINING_PASSES * work / step,
        "network_share_of_peak": work / call,
    }


def show(profile: Profile, depth: int, name: str) -> None:
    """The table of modules, and what a person wants to know of the whole."""
    shape = "x".join(str(side) for side in profile["image_shape"])
    table = Table("module", title=f"{name} on {shape}, {profile['num_classes']} classes")
    for column in ("parameters", "share", "MACs", "share"):
        table.add_column(column, justify="right")
    rows = counting.by_level([Cost(**module) for module in profile["modules"]], depth)
    for row in rows:
        table.add_row(row.name, *_cells(row, profile))
    table.add_section()
    table.add_row("all", *_cells(counting.total(rows), profile))
    console.print(table)
    seen = profile["flop_counter"]
    macs, flops = amount(profile["macs"]), amount(profile["flops"])
    say(f"{macs} MACs, {flops} FLOPs; PyTorch sees {amount(seen)}")
    if any(module["name"] == ELSEWHERE for module in profile["modules"]):
        say(
            f"What is {ELSEWHERE} PyTorch saw, and no module claimed; give a module that "
            "multiplies outside of its layers a method mixing_macs(*forward_inputs)"
        )
    if "precision" not in profile:
        return
    training, network = (profile[f"{key}_share_of_peak"] for key in ("training", "network"))
    say(
        f"On {profile['device']} in {profile['precision']}, batch {profile['batch_size']}; "
        f"products and convolutions reach {amount(profile['peak_flops'])} FLOP/s"
    )
    say(f"Training: {_speed(profile, 'training')}, {training:.0%} of that")
    say(f"Activations: {amount(profile['activation_bytes'])} bytes an image")
    say(f"A network call: {_speed(profile, 'network')}, {network:.0%} of that")
    if calls := profile["sampling_calls"]:
        say(f"Sampling in {calls} calls: {_speed(profile, 'sampling')}")


def compare(profiles: list[Profile], names: list[str]) -> None:
    """One table, a row a composition."""
    columns = {
        "params": "params",
        "MACs": "macs",
        "calls": "sampling_calls",
        "bytes": "activation_bytes",
        "train/s": "training_images_per_second",
        "draw/s": "sampling_images_per_second",
    }
    columns = {t: key for t, key in columns.items() if all(key in each for each in profiles)}
    caption = "bytes: activations of an image; train/s, draw/s: images a second"
    table = Table("composition", caption=caption if "bytes" in columns else None)
    for title in columns:
        table.add_column(title, justify="right")
    for name, result in zip(names, profiles, strict=True):
        values = [result[key] for key in columns.values()]
        table.add_row(name, *("" if value is None else amount(value) for value in values))
    console.print(table)


def _cells(row: Cost, profile: Profile) -> list[str]:
    return [
        amount(row.params),
        f"{row.params / max(profile['params'], 1):.1%}",
        amount(row.macs),
        f"{row.macs / max(profile['macs'], 1):.1%}",
    ]


def _speed(profile: Profile, what: str) -> str:
    return f"{amount(profile[f'{what}_images_per_second'])} images/s"
