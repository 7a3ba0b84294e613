"""The names under which a run logs, and the x-axes that its curves are drawn over.

A metric's name is `<kind>/<what it depends on>`, as in fid/efficientnet_lite0-96/train60k-5k.
Dashboards make a section for each text before a first slash, so there names begin with what is
looked at: samples/fid/..., and real/fid/... for real images.
"""

import re
from collections.abc import Mapping

IMAGES, SECONDS = "images", "seconds"
AXES = {IMAGES: "training images seen", SECONDS: "seconds of training"}
GRIDS = "grids"  # starts the names of image grids; what they show follows
SAMPLES = f"{GRIDS}/table"  # the table of samples
SUMMARY = "summary"  # starts the names of numbers of summary.json
ON_DASHBOARDS = {  # beginnings of names in records -> the same on dashboards; the first one counts
    r"(train|val|test)_by_level/": r"levels/\1/",
    r"(val|test)_latent/": r"latents/\1/",
    r"train_(weight_norm|grad_norm|update_norm|activation_max)/": r"modules/\1/",
    r"r((?:fid|kid)\w*/.+/)": r"reconstructions/\1",
    r"(\w+)_real(/.+/)": r"real/\1\2",
    r"((?!train/|val/|test/)\w+/.+/)": r"samples/\1",  # of metrics, with their protocol
}


def grouped(choices: Mapping[str, str | None]) -> dict[str, str]:
    """Hydra's choices as loggers can group runs by them: strings, under names without slashes."""
    return {
        group.replace("/", "_"): option
        for group, option in choices.items()
        if option is not None and not group.startswith(("hydra/", "callbacks"))
    }


def on_dashboards(name: str) -> str:
    """The name of a value on dashboards, from its name in records."""
    for beginning, shown in ON_DASHBOARDS.items():
        if found := re.match(beginning, name):
            return found.expand(shown) + name[found.end() :]
    return name
