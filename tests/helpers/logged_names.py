"""The scheme of the names under which runs log, as the page on W&B lists it."""

from fnmatch import fnmatchcase

from diffusion_lab.metrics.feature_distances import ClassFID
from diffusion_lab.metrics.quantities import BUILT_IN
from diffusion_lab.runs.log_names import AXES, GRIDS, SAMPLES

KINDS = ("fid_std", *(q.name for each in BUILT_IN if each is not ClassFID for q in each.quantities))
SCALARS = (
    "train/*",
    "train_by_level/t*",
    "train_weight_norm/*",
    "train_grad_norm/*",
    "train_update_norm/*",
    "train_activation_max/*",
    "val/*",
    "val_by_level/t*",
    "val_latent/*",
    "test/*",
    "test_by_level/t*",
    "test_latent/*",
    *(f"{kind}/*" for kind in KINDS),
    *(f"{kind}_real/*" for kind in KINDS),
    "fid_class*/*",
    "rfid*/*",  # r: of an autoencoder's reconstructions
    "rkid*/*",
)
SUMMARY = ("parameters", "training_seconds")  # keys of summary.json that W&B's summary has too


def is_known(name: str) -> bool:
    """Whether a run may log this name, or have it in its summary."""
    patterns = (*AXES, *SCALARS, *SUMMARY, f"{GRIDS}/*", SAMPLES)
    return any(fnmatchcase(name, pattern) for pattern in patterns)
