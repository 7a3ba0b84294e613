"""Models that ship with the package: pretrained:NAME means one wherever a run is meant.

A model is an export, which is copied to outputs/pretrained/NAME when it is first named, so that
samples and measurements of it have a place.
"""

from pathlib import Path

from diffusion_lab.common.files import OUTPUTS, write_atomically
from diffusion_lab.common.messages import UserError

PREFIX = "pretrained:"
MODELS = Path(__file__).parent / "models"


def names() -> list[str]:
    """The names of the models."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.yaml"))


def local(text: str) -> str:
    """The copy of a model, for pretrained:NAME; any other text unchanged; raises UserError."""
    if not text.startswith(PREFIX):
        return text
    name = text.removeprefix(PREFIX)
    if name not in names():
        raise UserError(f"{text} is no model of this package, which has {', '.join(names())}")
    place = OUTPUTS / "pretrained" / name
    place.mkdir(parents=True, exist_ok=True)
    for path in (MODELS / name).iterdir():
        content, copy = path.read_bytes(), place / path.name
        if not copy.exists() or copy.read_bytes() != content:
            write_atomically(copy, content)
    return str(place)
