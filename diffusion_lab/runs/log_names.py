"""The names under which a run logs, and the x-axes that its curves are drawn over.

A metric's name is `<kind>/<what it depends on>`, as in fid/efficientnet_lite0-96/train60k-5k.
"""

from collections.abc import Mapping

IMAGES, SECONDS = "images", "seconds"
AXES = {IMAGES: "training images seen", SECONDS: "seconds of training"}
GRIDS = "grids"  # starts the names of image grids; what they show follows
SAMPLES = "samples"  # the table of samples
SUMMARY = "summary"  # starts the names of numbers of summary.json


def grouped(choices: Mapping[str, str | None]) -> dict[str, str]:
    """Hydra's choices as loggers can group runs by them: strings, under names without slashes."""
    return {
        group.replace("/", "_"): option
        for group, option in choices.items()
        if option is not None and not group.startswith(("hydra/", "callbacks"))
    }
