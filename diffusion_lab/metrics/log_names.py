"""The names under which a run logs, and the x-axes that its curves are drawn over.

A figure's name is `<kind>/<what it depends on>`, as in fid/efficientnet_lite0-96/train60k-5k.
"""

from collections.abc import Mapping

IMAGES, SECONDS = "images", "seconds"
AXES = {IMAGES: "training images seen", SECONDS: "seconds of training"}
GRIDS = "grids"  # of pictures, by what they show
SAMPLES = "samples"  # the table


def grouped(choices: Mapping[str, str | None]) -> dict[str, str]:
    """Hydra's choices as a run keeps them for W&B to group by: strings under names without dots."""
    ours = {group: option for group, option in choices.items() if not group.startswith("hydra/")}
    return {
        group.replace("/", "_"): option
        for group, option in ours.items()
        if option is not None and "@" not in group
    }
