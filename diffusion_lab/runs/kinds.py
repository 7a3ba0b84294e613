"""The kinds of values in the files of a run; damaged files and those of others have other ones."""

from typing import Any

from omegaconf import DictConfig

from diffusion_lab.build.config_keys import CLASS, KEYS

# in summaries and evaluations, besides null; their metrics are numbers
RECORDED: dict[str, Any] = {
    "name ended_at git_commit device precision checkpoint": str,
    "steps images_seen began_from_images began_from_flops first_stage_seconds": int | float,
    "wall_seconds training_seconds sampling_seconds parameters training_images": int | float,
    "macs peak_memory_bytes forward_passes teacher_images teacher_calls": int | float,
    "metrics protocol sampling versions": dict,
    "at_other_steps extra_quantities overrides": list,
}
# in configurations, besides null
CONFIGURED: dict[str, Any] = {
    **{row[:-1]: DictConfig for row in KEYS if row.endswith(".") and row.count(".") == 1},
    "written_by protocol data.source": DictConfig,
    f"name family data.source.{CLASS}": str,
    "seed": int,
    "budget.seconds": int | float,
    "denoiser.self_conditioning": bool,
}


def is_record(found: object) -> bool:
    """Whether a summary or an evaluation has values of the kinds that this program writes."""
    if not isinstance(found, dict):
        return False
    known = ((found.get(key), kind) for keys, kind in RECORDED.items() for key in keys.split())
    if not all(value is None or isinstance(value, kind) for value, kind in known):
        return False
    metrics, protocol = found.get("metrics") or {}, found.get("protocol")
    return (
        all(isinstance(value, int | float) for value in metrics.values())
        and (not protocol or isinstance(protocol.get("num_samples"), int))
        and all(map(is_record, found.get("at_other_steps") or []))
        and all(isinstance(each, dict) for each in found.get("extra_quantities") or [])
    )


def wrong_key(cfg: DictConfig) -> str | None:
    """The first key of a configuration whose value is of a wrong kind; None if there is none."""
    for keys, kind in CONFIGURED.items():
        for key in keys.split():
            value = cfg
            for part in key.split("."):
                value = value.get(part) if isinstance(value, DictConfig) else None
            if value is not None and not isinstance(value, kind):
                return key
    return None
