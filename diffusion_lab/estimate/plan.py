"""Plans runs on GPUs that are not here, and prints memory, the time of a step, length and disk."""

from collections.abc import Mapping, Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from diffusion_lab.assembly.sentences import Combination
from diffusion_lab.common.formats import amount, duration
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.estimate import budget
from diffusion_lab.estimate.run_plan import RunPlan

GB, DAY = 1e9, 24 * 3600
MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "temporary": "temporary tensors of the optimiser",
    "averages": "averages of the weights",
    "gathered": "layers gathered by FSDP",
    "first_stage": "first stage",
    "images": "training images",
    "activations": "activations of {micro_batch} images",
}
STEP = {
    "compute": "passes, by FLOPs at mfu={mfu} (a guess)",
    "activations": "passes, by bytes of activations",
    "encoding": "encoding of images",
    "update": "update of the weights, by bytes",
    "communication": "communication at link_share={link_share} (a guess)",
    "waiting": "communication that passes do not hide",
    "host": "host: {operations} operations at launch={launch} (a guess), if not compiled",
    "seconds": "step",
}


def plan(
    cfg: DictConfig, overrides: list[str], combinations: list[Combination]
) -> dict[str, object]:
    """Plans one run, or several side by side; returns the results."""
    if cfg.resume:
        raise UserError("plan looks at a run before it is made; leave out resume=...")
    own = f"backbone={HydraConfig.get().runtime.choices['backbone']}"
    plans = []
    for each in combinations:
        cfg = budget.with_budget(each.cfg, each.overrides)
        plans.append(RunPlan(cfg, each.name or own))
    if len(plans) > 1:
        compare(plans)
    else:
        show(plans[0])
    results = [planned.as_dict() for planned in plans]
    return {"plans": results} if combinations[0].chosen else results[0]


def show(plan: RunPlan) -> None:
    """Prints one plan."""
    numbers, memory = plan.as_dict(), plan.memory
    words = numbers | numbers["guesses"]
    nodes = f"{plan.nodes} nodes of " if plan.nodes > 1 else ""
    say(f"{plan.name} on {nodes}{plan.devices} {plan.gpu.name}, {plan.precision}, {plan.strategy}")
    say(f"Model: {plan.cost}")
    say(f"Batch: {plan.batch}")
    held = {text.format(**words): getattr(memory, key) / GB for key, text in MEMORY.items()}
    held = {text: size for text, size in held.items() if size} | {"all": memory.total / GB}
    print_column("memory of a GPU", "GB", held)
    say(advice(plan))
    say(f"nvidia-smi would show about {numbers['memory']['shown'] / GB:.1f} GB (a guess)")
    taken = {text.format(**words): 1e3 * getattr(plan.step, key) for key, text in STEP.items()}
    if not plan.step.encoding:
        del taken[STEP["encoding"]]
    print_column("time of a step", "ms", taken)
    say(
        "Speed: {images_per_second:,.0f} images/s, {share_of_peak:.0%} of the peak without "
        "repeated FLOPs".format(**numbers)
    )
    if plan.step.host > plan.step.device:
        say("The GPU waits for the host: compilation and larger micro-batches help; see `profile`")
    lasts, cfg = plan.duration, plan.cfg
    limit = " (until trainer.max_time)" if lasts.steps < cfg.trainer.max_steps else ""
    seen = lasts.steps * cfg.batch_size
    epochs = f", {seen / cfg.num_images:.3g} epochs" if cfg.num_images else ""
    sampling = "an unknown time" if lasts.sampling is None else time(lasts.sampling)
    say(
        f"Run: {lasts.steps:,} steps{limit}, {amount(seen)} images{epochs}: "
        f"{time(lasts.training)} of training, {time(lasts.validation)} of validation and "
        f"{sampling} of sampling"
    )
    say(disk(numbers["disk"]))


def print_column(title: str, unit: str, values: Mapping[str, float]) -> None:
    """Prints a table of one column of numbers; the last row is their result."""
    table = Table(title, unit)
    table.columns[1].justify = "right"
    for text, value in values.items():
        if text == list(values)[-1]:
            table.add_section()
        table.add_row(text, f"{value:.3g}" if value < 100 else f"{value:.0f}")
    console.print(table)


def advice(plan: RunPlan) -> str:
    """Says whether a micro-batch fits, the largest that does, and what to write if none does."""
    less = f"{plan.gpu.memory / GB:.1f} less reserve={plan.cfg.reserve} (a guess)"
    room = f"{plan.usable / GB:.1f} GB, {less}"
    if plan.fits:
        return f"Fits into {room}; the largest micro-batch is {plan.largest_micro_batch} images"
    if plan.fitting:
        return f"Does not fit into {room}; write micro_batch_size={plan.fitting}"
    others = {
        "activation_checkpointing=true": not plan.cfg.activation_checkpointing,
        "trainer=fsdp": not plan.sharded and plan.batch.world > 1,
        "a smaller backbone": True,
    }
    return f"Does not fit into {room}; write {' or '.join(k for k, v in others.items() if v)}"


def disk(taken: Mapping[str, int | None]) -> str:
    """The disk that a run takes, from bytes by what they are for."""
    sizes = {key: f"{(size or 0) / GB:.3g} GB" for key, size in taken.items()}
    line = "Disk: {checkpoint} a checkpoint, {checkpoints} of them at most".format(**sizes)
    for key in ("snapshots", "latents", "features"):
        line += f", {sizes[key]} of {key}" if taken[key] else ""
    return f"{line}; num_images=... adds caches" if None in taken.values() else line


def time(seconds: float) -> str:
    """A duration, in days from one and a half days on."""
    return f"{seconds / DAY:.3g} days" if seconds >= 1.5 * DAY else duration(seconds)


def compare(plans: Sequence[RunPlan]) -> None:
    """Prints one table, a row per plan."""
    table = Table(caption="GB: of a GPU, red if they do not fit; largest: micro-batch, in images")
    words = " ".join(plan.name for plan in plans).split()
    table.add_column("composition", min_width=max(map(len, words)))
    for title in ("GPUs", "GB", "largest", "images/s", "days"):
        table.add_column(title, justify="right")
    for plan in plans:
        held = f"{plan.memory.total / GB:.3g}"
        table.add_row(
            plan.name,
            str(plan.batch.world),
            held if plan.fits else f"[red]{held}[/]",
            str(plan.largest_micro_batch),
            f"{plan.images_per_second:,.0f}",
            f"{plan.duration.seconds / DAY:.3g}",
        )
    console.print(table)
