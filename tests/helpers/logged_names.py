"""Whether a name is one under which runs log: the scheme that the README lists."""

from fnmatch import fnmatchcase

from diffusion_lab.metrics.feature_distances import ClassFID
from diffusion_lab.metrics.log_names import AXES, GRIDS, SAMPLES
from diffusion_lab.metrics.quantities import CLASSES

KINDS = ("fid_std", *(q.name for each in CLASSES if each is not ClassFID for q in each.quantities))
SCALARS = (
    "train/*",
    "val/*",
    "val_by_level/t*",
    "val_latent/*",
    *(f"{kind}/*" for kind in KINDS),
    *(f"{kind}_real/*" for kind in KINDS),
    "fid_class*/*",
    "rfid*/*",  # of an autoencoder's reconstructions
    "rkid*/*",
)
SUMMARY = ("parameters", "training_seconds")  # of summary.json, which W&B's summary holds


def is_known(name: str) -> bool:
    """Whether anything that a run logs, or leaves in its summary, may have this name."""
    patterns = (*AXES, *SCALARS, *SUMMARY, f"{GRIDS}/*", SAMPLES)
    return any(fnmatchcase(name, pattern) for pattern in patterns)
