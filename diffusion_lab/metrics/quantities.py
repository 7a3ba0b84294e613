"""The table of all quantities, made of what each metric says of itself."""

from collections.abc import Sequence

from diffusion_lab.metrics.accuracy import Accuracy
from diffusion_lab.metrics.coverage import DensityCoverage, PrecisionRecall
from diffusion_lab.metrics.fid import FID, ClassFID
from diffusion_lab.metrics.inception_score import InceptionScore
from diffusion_lab.metrics.kid import KID
from diffusion_lab.metrics.metric import LOWER, Quantity
from diffusion_lab.metrics.neighbours import COPIES, PIXEL_COPIES

HELD_OUT = Quantity("held_out_loss", "Held-out loss", "denoising loss of test images", LOWER)
VALIDATION = {"val/loss": False, "val/psnr": True, "val/ssim": True}  # whether higher is better
CLASSES = (FID, KID, PrecisionRecall, DensityCoverage, InceptionScore, Accuracy, ClassFID)
QUANTITIES = (
    *(quantity for metric in CLASSES for quantity in metric.quantities),
    HELD_OUT,
    COPIES,
    PIXEL_COPIES,
)


def quantity_of(name: str, extra: Sequence[Quantity] = ()) -> Quantity | None:
    """The quantity of a result such as fid/..., fid_class3 or rkid, or None if it is unknown.

    `extra` are quantities of metrics from outside the package. An r stands before the metrics of
    an autoencoder's reconstructions.
    """
    known = {quantity.name: quantity for quantity in (*QUANTITIES, *extra)}
    kind = name.partition("/")[0].rstrip("0123456789") or name
    return known.get(kind) or known.get(kind.removeprefix("r"))


def higher_is_better(name: str, extra: Sequence[Quantity] = ()) -> bool | None:
    """Whether a result of this name is better the higher it is; None if that is not known."""
    if name in VALIDATION:
        return VALIDATION[name]
    quantity = quantity_of(name, extra)
    return None if quantity is None else quantity.higher_is_better
