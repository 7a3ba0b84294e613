"""Decodes image files into one uint8 tensor, by Pillow in threads, and names those it cannot use.

The first of several frames is used, and the EXIF orientation applied. Transparency becomes white,
and 16-bit grey is scaled to 8 bits. C channels, 1 for grey or 3 for RGB.
"""

import errno
import io
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_lab.common.messages import progress_bar
from diffusion_lab.compute.started import in_launched_process, processes_started
from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.listing import ImageFiles

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow's others are never used
LANCZOS = Image.Resampling.LANCZOS
LARGEST = 2**28  # bytes of an encoded image: three for each pixel that Pillow allows at most
HEADERS = 1000  # most headers read to infer size and channels
QUEUED = 4096  # images that wait for a thread; each takes a kB of memory
MEMORY_SHARE = 0.8  # share of the free memory that images may take
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap width and height
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")


class BadImage(Exception):
    """An image cannot be used; the message says why."""


def check_bytes(size: int) -> None:
    """Raises BadImage if an encoded image has so many bytes, which are read at once."""
    if size > LARGEST:
        raise BadImage(f"{size:,} bytes are more than {LARGEST:,}")


def _refuse(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    width, height = size
    raise BadImage(
        f"{image.height}x{image.width} pixels instead of {height}x{width}; write "
        f"data.source.image_size={_size_text(height, width)} data.source.resize=crop to crop it"
    )


# how an image of another size becomes (width, height); the filter avoids aliasing
RESIZE: dict[str, Callable[[Image.Image, tuple[int, int]], Image.Image]] = {
    "crop": lambda image, size: ImageOps.fit(image, size, LANCZOS),  # fill, then cut the rest
    "stretch": lambda image, size: image.resize(size, LANCZOS),
    "pad": lambda image, size: ImageOps.pad(image, size, LANCZOS, color=0),  # whole, on black
    "refuse": _refuse,
}


def infer(files: ImageFiles) -> tuple[tuple[int, int], int]:
    """Infers the most common (height, width) and the number of channels from some files' headers.

    There is 1 channel if all these files are grey, else 3. Raises DataError if none has a header.
    """
    step = -(-len(files) // HEADERS)
    headers, reason = [], ""
    for name in files.names[::step]:
        try:
            with files.open(name) as stream:
                headers.append(_header(stream))
        except Exception as error:  # decoding will report this bad image
            reason = f"{name} ({_short(error)})"
    if not headers:
        raise DataError(f"{files.where} has no image that can be read: {reason}")
    (size, _), *_ = Counter(size for size, _ in headers).most_common(1)
    return size, 1 if all(grey for _, grey in headers) else 3


def check_memory(count: int, shape: tuple[int, int, int]) -> None:
    """Raises DataError unless `count` images of `shape` (C, H, W) fit into the free memory."""
    free = free_memory()
    if free is None:
        return
    channels, height, width = shape
    # every process of a machine holds all images
    processes = processes_started()[0] if in_launched_process() else 1
    allowed = MEMORY_SHARE * free / processes
    needed = count * channels * height * width
    if needed > allowed:
        scale = (allowed / needed) ** 0.5
        fit = _size_text(*(max(1, int(scale * side)) for side in (height, width)))
        raise DataError(
            f"{count:,} images of {channels} x {height} x {width} need {needed / 1e9:.3g} GB, but "
            f"only {allowed / 1e9:.3g} GB of memory are available; write "
            f"store=true to keep them in a file, or image_size={fit} or less"
        )


def free_memory() -> int | None:
    """Returns the available memory in bytes, or None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None


def decode_into(array: np.ndarray, files: ImageFiles, resize: str) -> dict[int, str]:
    """Decodes into uint8 (N, C, H, W); returns, by index, why some images could not be used.

    Raises DataError for a file that the system cannot read now, as on a network disk that fails.
    """
    shape = array.shape[1:]

    def fill(index: int) -> str | None:
        name = files.names[index]
        try:
            with files.open(name) as stream:
                array[index] = pixels(stream.read(), shape, resize)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            # not kept as damaged: the image may be whole; the errors of Pillow have no number, and
            # a file that is missing is a fact on the data
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise DataError(
                    f"{files.where}: {name} cannot be read ({error.strerror}); try again, or make "
                    "it readable"
                ) from error
            return _short(error)
        return None

    pool = ThreadPoolExecutor(torch.get_num_threads())
    bar = progress_bar(f"Decoding {len(files):,} images of {files.where}", len(files))
    bad = {}
    with bar as advance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # harmless, or refused anyway
        try:
            for start in range(0, len(files), QUEUED):
                part = range(len(files))[start : start + QUEUED]
                for index, reason in zip(part, pool.map(fill, part), strict=True):
                    if reason is not None:
                        bad[index] = reason
                    advance()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all images
    return bad


def pixels(content: bytes, shape: tuple[int, int, int], resize: str) -> np.ndarray:
    """Decodes one image to uint8 (C, H, W); raises BadImage, or what the decoder raises."""
    channels, height, width = shape
    image = _opened(io.BytesIO(content))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bits(image)
    if channels == 3:
        image = image.convert("RGB")
    elif image.mode == "RGB":
        red, green, blue = image.split()
        if not red.tobytes() == green.tobytes() == blue.tobytes():
            raise BadImage("it is in colour, which needs channels=3")
        image = red
    if image.size != (width, height):
        image = RESIZE[resize](image, (width, height))
    array = np.asarray(image)  # (H, W) or (H, W, 3)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _opened(stream: IO[bytes]) -> Image.Image:
    """Opens an image by its header; raises BadImage for an unknown format or too many pixels."""
    if not stream.read(1):
        raise BadImage("it is empty")
    stream.seek(0)
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage(f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error
    except Image.DecompressionBombError as error:
        raise BadImage("it has suspiciously many pixels") from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise BadImage(f"{image.height}x{image.width} pixels are more than {limit:,}")
    return image


def _header(stream: IO[bytes]) -> tuple[tuple[int, int], bool]:
    """Reads (height, width) as shown, and whether the image is grey, without decoding it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        image = _opened(stream)
    # getexif would decode a PNG to look behind its pixels; a TIFF's size is as shown already
    asked = "exif" in image.info if image.format == "PNG" else image.format != "TIFF"
    turned = asked and image.getexif().get(ORIENTATION) in TURNED
    return image.size if turned else image.size[::-1], _grey(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts an image to mode L if it is grey, else to RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("its grey values have more than 16 bits")
        if isinstance(hidden := image.info.get("transparency"), int):
            values[values == hidden] = 65535  # white
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("its grey values are floating-point numbers in an unknown range")
    mode = "L" if _grey(image) else "RGB"
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _grey(image: Image.Image) -> bool:
    """Whether an image is grey by its mode, or by its palette."""
    if image.mode != "P" or image.palette is None:
        return image.mode in GREY_MODES
    palette = image.palette
    order, colours = palette.rawmode or palette.mode, bytes(palette.palette)
    red, green, blue = (colours[i :: len(order)] for i in range(3))
    return order in ("RGB", "RGBA", "BGR", "BGRX") and red == green == blue


def _size_text(height: int, width: int) -> str:
    """Writes a size as the setting image_size takes it."""
    return str(height) if height == width else f"[{height},{width}]"


def _short(error: Exception) -> str:
    """Returns why an image cannot be used, on one line."""
    reason = str(error) or type(error).__name__
    return reason if isinstance(error, BadImage) else f"damaged: {reason}"
