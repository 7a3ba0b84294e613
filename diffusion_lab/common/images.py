"""Pictures: uint8 in [0, 255] <-> float in [-1, 1], padding, grids and PNG files.

B batch, C channels, H height, W width in pixels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion_lab.common.files import replacing
from diffusion_lab.common.messages import UserError

GAP = 2  # pixels between the images of a grid
ENLARGED = 2  # default factor by which a PNG is enlarged
# of a grid: 1,000 classes in rows of 10 would take hours to draw, and no viewer opens the picture
MOST_ROWS, MOST_IMAGES = 100, 1000


class NotDrawn(UserError):
    """The error for samples that cannot be drawn, in spite of settings that are allowed."""


class NotFinite(NotDrawn):
    """The error for samples that are infinite or not a number, which as pixels would be black."""

    diverged = True


def require_finite(samples: Tensor) -> Tensor:
    """Returns samples (B, ...) as they are; raises NotFinite unless all their values are finite."""
    if bad := len(samples) - int(samples.flatten(1).isfinite().all(1).sum()):
        raise NotFinite(
            f"{bad} of {len(samples)} samples are not finite: the model or its sampler diverged; "
            "try another sampler, a lower guidance.scale, or precision=32-true"
        )
    return samples


def to_float(images: Tensor) -> Tensor:
    """Converts uint8 in [0, 255] to float32 in [-1, 1]."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Converts float in [-1, 1] to uint8, rounded to nearest and clipped; inverts `to_float`."""
    # float32 first: bf16 has 8 bits, too few to round with
    return ((images.to(torch.float32) + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def pad_to(images: Tensor, size: int) -> Tensor:
    """Centres (B, C, H, W) in (B, C, size, size); ValueError if the images are larger."""
    height, width = images.shape[-2:]
    if size < max(height, width):
        raise ValueError(f"{height}x{width} images cannot be padded to {size}x{size}")
    top, left = (size - height) // 2, (size - width) // 2
    borders = (left, size - width - left, top, size - height - top)
    return F.pad(images, borders)


def crop_to(images: Tensor, height: int, width: int) -> Tensor:
    """The centre of (B, C, H, W) as (B, C, height, width); undoes `pad_to`."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def most_rows(columns: int) -> int:
    """The number of rows that a grid of so many columns has at most."""
    return min(MOST_ROWS, max(1, MOST_IMAGES // columns))


def grid(images: Tensor, columns: int) -> Tensor:
    """Arranges uint8 (B, C, H, W) in reading order on white, in one picture (C, height, width)."""
    rows = -(-len(images) // columns)
    spare = rows * columns - len(images)
    images = F.pad(images, (GAP, 0, GAP, 0, 0, 0, 0, spare), value=255)
    cells = images.unflatten(0, (rows, columns))  # (rows, columns, C, H, W)
    picture = cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(picture, (0, GAP, 0, GAP), value=255)


def save_png(picture: Tensor, path: Path, scale: int = ENLARGED) -> None:
    """Writes uint8 (C, H, W), C = 1 or 3, as a PNG, enlarged and unblurred; atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        as_pil(enlarged(picture, scale)).save(file, format="png", optimize=True)


def enlarged(picture: Tensor, scale: int) -> Tensor:
    """Enlarges a picture (C, H, W) `scale` times without blurring."""
    return picture.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def image_grid(images: Tensor, columns: int, scale: int = ENLARGED) -> Image.Image:
    """Arranges uint8 (B, C, H, W), C = 1 or 3, as `grid` does, enlarged, for a notebook to show."""
    return as_pil(enlarged(grid(images, columns), scale))


def as_pil(picture: Tensor) -> Image.Image:
    """Converts uint8 (C, H, W), C = 1 or 3, to a Pillow image."""
    array = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())
