"""The command `evaluate`: FID and other metrics of a trained run, next to other runs."""

from omegaconf import DictConfig

from diffusion_lab.assembly.config_keys import as_list, flattered
from diffusion_lab.assembly.instantiate import check_keys, errors_at
from diffusion_lab.common.files import require_writable
from diffusion_lab.common.messages import UserError, console, say
from diffusion_lab.common.ranges import optional, whole
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.families.images.run import open_images
from diffusion_lab.metrics.generative import PreparedMetrics
from diffusion_lab.metrics.quantity import ceiling, report, side_by_side
from diffusion_lab.pipeline.evaluation import evaluate
from diffusion_lab.runs.opened import inherited, open_run
from diffusion_lab.runs.results import comparable_metrics, require_evaluations, sampling_of
from diffusion_lab.training.callbacks import sampling_seed


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
    results = results | ceiling(results, opened.reconstruction_metrics)
    for line in report(results, opened.datamodule.class_names, metrics.extra_quantities):
        say(line)
    path = on_rank_zero(lambda: opened.record(cfg, results, protocol, metrics.extra_facts, seconds))
    say(f"Saved in {path}")
    say_if_flattered(opened.saved, cfg.metrics, metrics.extractor.name)
    if compared:
        console.print(side_by_side({cfg.run: results} | compared))
    return results


def say_if_flattered(trained: DictConfig, metrics: DictConfig, features: str) -> None:
    """Says that FID on these features flatters a run that was aligned to them, if it was."""
    if flattered(trained, metrics):
        say(f"The run was aligned to features of {features}: FID on them flatters it")
