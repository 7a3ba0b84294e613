"""The names under which a run logs, and the x-axes that its curves are drawn over.

A figure's name is `<kind>/<what it depends on>`, as in fid/efficientnet_lite0-96/train60k-5k.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

IMAGES, SECONDS = "images", "seconds"
AXES = {
    IMAGES: "training images seen",
    SECONDS: "since the run began, without the time between being stopped and resumed",
}
SUMMARY = {
    "parameters": "of the network",
    "wall_seconds": "that the run took",
}  # of summary.json, all of which is in the run's summary
GRIDS = "grids"  # of pictures, by what they show
SAMPLES = "samples"  # the table
FIGURES = (
    *("fid", "fid_std", "fid_infinity", "kid", "precision", "recall", "density", "coverage"),
    *("inception_score", "accuracy"),
)  # kinds; of each there is a floor, too
SCALARS = {
    "train/*": "of training: loss and its parts, lr, images_per_second",
    "val/*": "of held-out images: loss, or an autoencoder's psnr, ssim and use of its code",
    "val_by_level/t*": "the held-out loss at one noise level",
    "val_latent/*": "mean and std of one channel of an autoencoder's latents",
} | {
    pattern: meaning
    for kind in FIGURES
    for pattern, meaning in (
        (f"{kind}/*", f"{kind} of generated images"),
        (f"{kind}_floor/*", f"{kind} of as many real images"),
    )
}
SCALARS |= {
    "fid_class*/*": "of the images of one class, and its floor",
    "rfid*/*": "of an autoencoder's reconstructions, and its floor",
    "rkid*/*": "of an autoencoder's reconstructions, and its floor",
}


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
