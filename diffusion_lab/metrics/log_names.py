"""The names under which a run logs, and the x-axes that its curves are drawn over.

A figure's name is `<kind>/<what it depends on>`, as in fid/efficientnet_lite0-96/train60k-5k.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

IMAGES, SECONDS = "images", "seconds"
AXES = {IMAGES: "training images seen", SECONDS: "seconds of training"}
SUMMARY = ("parameters", "training_seconds")  # of summary.json, all of which is in W&B's summary
GRIDS = "grids"  # of pictures, by what they show
SAMPLES = "samples"  # the table
FIGURES = (  # kinds; of each there is a floor, too
    *("fid", "fid_std", "fid_infinity", "kid", "precision", "recall", "density", "coverage"),
    *("inception_score", "accuracy"),
)
SCALARS = (
    "train/*",
    "val/*",
    "val_by_level/t*",
    "val_latent/*",
    *(f"{kind}/*" for kind in FIGURES),
    *(f"{kind}_floor/*" for kind in FIGURES),
    "fid_class*/*",
    "rfid*/*",  # of an autoencoder's reconstructions
    "rkid*/*",
)


def is_known(name: str) -> bool:
    """Whether anything that a run logs, or leaves in its summary, may have this name."""
    patterns = (*AXES, *SCALARS, *SUMMARY, f"{GRIDS}/*", SAMPLES)
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def figure(kind: str, protocol: str) -> str:
    """The name of a figure measured by a protocol, as efficientnet_lite0-96/train60k-5k."""
    return f"{kind}/{protocol}"


def grouped(choices: Mapping[str, str | None]) -> dict[str, str]:
    """Hydra's choices as a run keeps them for W&B to group by: strings under names without dots."""
    ours = {group: option for group, option in choices.items() if not group.startswith("hydra/")}
    return {
        group.replace("/", "_"): option
        for group, option in ours.items()
        if option is not None and "@" not in group
    }
