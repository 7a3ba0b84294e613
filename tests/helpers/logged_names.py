"""The scheme of the names on dashboards, as the page on W&B lists it."""

from fnmatch import fnmatchcase

from diffusion_lab.metrics.quantity import OF_SAMPLES
from diffusion_lab.runs.log_names import AXES, GRIDS, SAMPLES

KINDS = ("fid_std", *(q.name for q in OF_SAMPLES if q.name != "fid_class"))
SCALARS = (
    "train/*",
    "val/*",
    "test/*",
    *(f"levels/{part}/t*" for part in ("train", "val", "test")),
    *(f"latents/{part}/*" for part in ("val", "test")),
    *(f"modules/{each}/*" for each in ("weight_norm", "grad_norm", "update_norm")),
    "modules/activation_max/*",
    *(f"samples/{kind}/*" for kind in KINDS),
    *(f"real/{kind}/*" for kind in KINDS),
    "samples/fid_class*/*",
    "real/fid_class*/*",
    "reconstructions/fid*/*",
    "reconstructions/kid*/*",
)
SUMMARY = ("parameters", "training_seconds")  # keys of summary.json that W&B's summary has too


def is_known(name: str) -> bool:
    """Whether a dashboard may have this name, or W&B's summary."""
    patterns = (*AXES, *SCALARS, *SUMMARY, f"{GRIDS}/*", SAMPLES)
    return any(fnmatchcase(name, pattern) for pattern in patterns)
