"""Encoded images to pixels: every mode, orientation and size, and files that are no images."""

import errno
import io
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import PIL
import pytest
from helpers.processes import SRUN, TORCHRUN
from helpers.refusals import refused
from PIL import Image

from diffusion_lab.data.source import decoding
from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.decoding import BadImage, check_memory, decode_into, infer, pixels
from diffusion_lab.data.source.image_folder import in_folder
from diffusion_lab.data.source.listing import ImageFiles

GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
RED, BLUE = (200, 30, 10), (10, 30, 200)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


GREY_PNG = encoded(Image.fromarray(GREY))


def filled(mode: str, colour, size: tuple[int, int] = (3, 2)) -> Image.Image:
    return Image.new(mode, size, colour)


def files(contents: dict[str, bytes]) -> ImageFiles:
    names, labels = list(contents), [0] * len(contents)
    read, size = lambda name: io.BytesIO(contents[name]), lambda name: len(contents[name])
    return ImageFiles("pictures", names, (), labels, read, size)


def read(content: bytes, channels: int, size=(4, 6), resize: str = "refuse") -> np.ndarray:
    return pixels(content, (channels, *size), resize)


def decoded(found: ImageFiles, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[int, str]]:
    images = np.zeros((len(found), *shape), np.uint8)
    return images, decode_into(images, found, "refuse")


class TestModes:
    def test_grey_is_kept_to_the_pixel(self):
        assert read(GREY_PNG, 1).dtype == np.uint8
        assert np.array_equal(read(GREY_PNG, 1), GREY[None])
        assert np.array_equal(read(GREY_PNG, 3), np.stack([GREY] * 3))

    def test_colours_are_kept_to_the_pixel_and_channels_come_first(self):
        colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        found = read(encoded(Image.fromarray(colours)), 3)
        assert np.array_equal(found, colours.transpose(2, 0, 1))

    def test_black_and_white(self):
        content = encoded(Image.fromarray(GREY > 100))
        assert np.array_equal(read(content, 1)[0], (GREY > 100) * 255)

    def test_sixteen_bits_are_scaled_to_eight(self):
        deep = np.array([[0, 128, 129, 257], [256, 32768, 65406, 65535]], dtype=np.uint16)
        expected = [[0, 0, 1, 1], [1, 128, 254, 255]]
        for form in ("PNG", "TIFF"):
            assert read(encoded(Image.fromarray(deep), form), 1, (2, 4))[0].tolist() == expected

    def test_a_grey_of_sixteen_bits_that_is_transparent_becomes_white(self):
        deep = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
        assert read(encoded(deep, "PNG", transparency=257), 1, (1, 3))[0].tolist() == [
            [0, 255, 255]
        ]

    def test_numbers_without_a_known_range_are_refused(self):
        for values in (np.full((2, 2), 70_000, np.int32), np.full((2, 2), 0.5, np.float32)):
            with refused("grey", by=BadImage):
                read(encoded(Image.fromarray(values), "TIFF"), 1, (2, 2))

    def test_a_palette_is_looked_up(self):
        image = filled("P", 0)
        image.putpalette([*RED, *BLUE])
        image.putpixel((2, 1), 1)
        found = read(encoded(image), 3, (2, 3))
        assert found[:, 0, 0].tolist() == list(RED)
        assert found[:, 1, 2].tolist() == list(BLUE)

    def test_a_grey_palette_is_grey(self):
        image = Image.fromarray(GREY).convert("P")
        image.putpalette([value for value in range(256) for _ in range(3)])
        for form in ("PNG", "GIF", "BMP"):
            content = encoded(image, form)
            assert infer(files({"a": content})) == ((4, 6), 1)
            assert np.array_equal(read(content, 1)[0], GREY)

    @pytest.mark.parametrize(
        ("mode", "colour", "shown"),
        [
            ("RGBA", (*RED, 255), RED),
            ("RGBA", (*RED, 0), (255, 255, 255)),
            ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
            ("LA", (100, 0), (255, 255, 255)),
            ("LA", (100, 51), (224, 224, 224)),
        ],
    )
    def test_what_is_transparent_shows_white(self, mode, colour, shown):
        content = encoded(filled(mode, colour))
        assert read(content, 3, (2, 3))[:, 1, 1].tolist() == list(shown)
        if mode == "LA":
            assert read(content, 1, (2, 3))[0, 1, 1] == shown[0]

    def test_a_transparent_colour_shows_white(self):
        palette = filled("P", 0)
        palette.putpalette([*RED, *BLUE])
        palette.putpixel((0, 0), 1)
        for image, key in ((palette, 0), (filled("RGB", RED), RED), (filled("L", 7), 7)):
            found = read(encoded(image, transparency=key), 3, (2, 3))
            assert found[:, 1, 1].tolist() == [255] * 3
        assert read(encoded(palette, transparency=0), 3, (2, 3))[:, 0, 0].tolist() == list(BLUE)

    def test_printers_and_televisions_colours(self):
        cmyk = encoded(filled("CMYK", (0, 255, 255, 0), (16, 16)), "JPEG", quality=100)
        assert abs(read(cmyk, 3, (16, 16))[:, 8, 8].astype(int) - [255, 0, 0]).max() <= 2
        if int(PIL.__version__.split(".")[0]) < 13:
            return  # older ones do not read the YCbCr TIFF that they write
        ycbcr = encoded(filled("RGB", RED).convert("YCbCr"), "TIFF")
        assert abs(read(ycbcr, 3, (2, 3))[:, 0, 0].astype(int) - RED).max() <= 2

    def test_grey_stored_in_three_channels_fits_one(self):
        assert np.array_equal(read(encoded(Image.fromarray(GREY).convert("RGB")), 1)[0], GREY)
        with refused("channels=3", by=BadImage):
            read(encoded(filled("RGB", RED)), 1, (2, 3))

    def test_of_several_frames_the_first_counts(self):
        more = {"save_all": True, "append_images": [filled("L", 200)], "loop": 0}
        content = encoded(filled("L", 7), "GIF", **more)
        assert (read(content, 1, (2, 3)) == 7).all()


class TestOrientation:
    def turned(self, form: str, orientation: int) -> bytes:
        exif = Image.Exif()
        exif[decoding.ORIENTATION] = orientation
        return encoded(Image.fromarray(GREY), form, exif=exif)

    @pytest.mark.parametrize("form", ["PNG", "TIFF"])
    def test_exif_is_followed(self, form):
        # 6: the picture has to be turned clockwise, as the camera was held so
        content = self.turned(form, 6)
        assert np.array_equal(read(content, 1, (6, 4))[0], np.rot90(GREY, -1))
        assert np.array_equal(read(self.turned(form, 3), 1)[0], np.rot90(GREY, 2))
        assert infer(files({"a": content})) == ((6, 4), 1)

    def test_headers_of_a_jpeg_tell_it_too(self):
        assert infer(files({"a": self.turned("JPEG", 8)})) == ((6, 4), 1)
        assert infer(files({"a": self.turned("JPEG", 2)})) == ((4, 6), 1)


class TestResize:
    # three squares in a row: black, grey, white
    SQUARES = np.repeat([[0, 100, 255]], 12, axis=1).repeat(12, axis=0).astype(np.uint8)
    BANDS = encoded(Image.fromarray(SQUARES))

    def test_crop_keeps_the_middle(self):
        assert (read(self.BANDS, 1, (12, 12), "crop") == 100).all()
        # an image that is enlarged is cut, too
        assert (read(self.BANDS, 1, (24, 12), "crop") == 100)[0, :, 2:-2].all()

    def test_stretch_keeps_all(self):
        found = read(self.BANDS, 1, (12, 12), "stretch")[0]
        assert found.shape == (12, 12)
        assert abs(found[:, [0, 1, 5, 6, 11]].astype(int) - [0, 0, 100, 100, 255]).max() <= 10

    def test_pad_keeps_all_on_black(self):
        found = read(self.BANDS, 1, (36, 36), "pad")[0]
        assert (found[:12] == 0).all()
        assert (found[24:] == 0).all()
        assert np.array_equal(found[12:24], self.SQUARES)

    def test_another_size_is_refused_where_none_is_wanted(self):
        with refused("12x36", "8x9", "image_size=[8,9]", by=BadImage):
            read(self.BANDS, 1, (8, 9), "refuse")

    @pytest.mark.parametrize("resize", sorted(decoding.RESIZE))
    def test_the_right_size_is_left_alone(self, resize):
        assert np.array_equal(read(GREY_PNG, 1, resize=resize)[0], GREY)

    def test_fine_stripes_become_grey_instead_of_moire(self):
        stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
        for resize in ("crop", "stretch", "pad"):
            found = read(encoded(Image.fromarray(stripes)), 1, (8, 8), resize)
            assert abs(found.astype(int) - 127).max() <= 6


def huge_png() -> bytes:
    """Makes a few bytes that claim to be 100,000 x 100,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


class TestBadImages:
    def test_each_is_told_by_its_place_and_the_others_are_read(self):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
        good = encoded(Image.fromarray(noise))
        contents = {
            "good.png": good,
            "truncated.png": good[:2000],
            "empty.png": b"",
            "text.png": b"no image at all",
            "bomb.png": huge_png(),
            "small.png": encoded(filled("L", 0)),
            "coloured.png": encoded(filled("RGB", RED, (64, 64))),
            "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
            "last.png": good,
        }
        images, bad = decoded(files(contents), (1, 64, 64))
        assert sorted(bad) == [1, 2, 3, 4, 5, 6, 7]
        assert np.array_equal(images[0, 0], noise)
        assert np.array_equal(images[8, 0], noise)
        reasons = dict(zip(list(contents)[1:-1], bad.values(), strict=True))
        assert reasons["truncated.png"].startswith("damaged: ")
        assert reasons["empty.png"] == "it is empty"
        assert reasons["text.png"].startswith("it is not a PNG, JPEG")
        assert "many pixels" in reasons["bomb.png"]
        assert "2x3 pixels instead of 64x64" in reasons["small.png"]
        assert "in colour" in reasons["coloured.png"]
        assert reasons["script.png"].startswith("it is not a PNG")

    def test_many_pixels_are_no_image_either(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 23)
        _, bad = decoded(files({"a": GREY_PNG}), (1, 4, 6))
        assert bad == {0: "4x6 pixels are more than 23"}

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (FileNotFoundError(2, "It is gone"), "[Errno 2] It is gone"),
            (EOFError(), "EOFError"),
        ],
    )
    def test_a_file_that_cannot_be_read_is_bad(self, error, reason):
        def unreadable(name):
            raise error

        _, bad = decoded(ImageFiles("x", ["a.png"], (), [0], unreadable, hash), (1, 4, 6))
        assert bad == {0: f"damaged: {reason}"}

    @pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
    def test_an_error_of_the_system_makes_no_image_bad(self, number):
        def failing(name):
            raise OSError(number, os.strerror(number))

        found = ImageFiles("pictures", ["a.png"], (), [0], failing, hash)
        with refused("pictures", "a.png", os.strerror(number), by=DataError):
            decoded(found, (1, 4, 6))

    def test_nor_does_a_link_over_a_stale_disk(self, tmp_path, monkeypatch):
        (tmp_path / "a.png").symlink_to(tmp_path / "elsewhere.png")
        found = in_folder(tmp_path, "pictures")
        with pytest.raises(BadImage):
            found.open("a.png")

        def stale(*_, **__):
            raise OSError(errno.ESTALE, "stale")

        monkeypatch.setattr(os, "stat", stale)
        with pytest.raises(OSError, match="stale"):
            found.open("a.png")

    def test_nor_does_a_lack_of_memory(self):
        def failing(name):
            raise MemoryError

        with pytest.raises(MemoryError):
            decoded(ImageFiles("x", ["a.png"], (), [0], failing, hash), (1, 4, 6))


class TestInference:
    def test_the_most_common_size_and_grey_only_if_all_are(self):
        small, large = filled("L", 0), filled("L", 0, (5, 5))
        coloured = filled("RGB", RED)
        names = {"a": large, "b": small, "c": small, "d": large, "e": small}
        contents = {name: encoded(image) for name, image in names.items()} | {"f": b"damaged"}
        assert infer(files(contents)) == ((2, 3), 1)
        assert infer(files(contents | {"g": encoded(coloured)})) == ((2, 3), 3)

    def test_nothing_readable_is_one_sentence(self):
        with refused("pictures", " b (", by=DataError):
            infer(files({"a": b"", "b": b"text"}))

    def test_few_headers_tell_of_many_files(self, monkeypatch):
        monkeypatch.setattr(decoding, "HEADERS", 3)
        opened = []
        many = files({f"{i:02}": encoded(filled("L", 0)) for i in range(10)})
        counted = replace(many, open=lambda name: opened.append(name) or many.open(name))
        infer(counted)
        assert opened == ["00", "04", "08"]


class TestMemory:
    def test_images_that_do_not_fit_are_refused_with_a_size_that_does(
        self, monkeypatch, environment
    ):
        monkeypatch.setattr(decoding, "free_memory", lambda: 10_000_000)
        check_memory(1000, (3, 51, 51))  # 7.8 MB
        with refused("1,000 images", "3 x 64 x 64", "image_size=51 ", by=DataError):
            check_memory(1000, (3, 64, 64))
        with refused("image_size=[36,73]", by=DataError):
            check_memory(1000, (3, 64, 128))
        srun = SRUN | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
        for started in (srun, TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}):
            environment(started)
            with refused("image_size=25 ", by=DataError):
                check_memory(1000, (3, 51, 51))

    def test_this_machine_says_what_is_free(self):
        assert decoding.free_memory() > 1_000_000

    def test_a_system_that_does_not_say_is_trusted(self, monkeypatch):
        monkeypatch.setattr(decoding, "free_memory", lambda: None)
        check_memory(10**9, (3, 1024, 1024))


def test_decoded_images_are_in_the_order_of_their_names():
    contents = {f"{i}.png": encoded(filled("L", 5 * i)) for i in (7, 3, 40, 1)}
    images, bad = decoded(files(contents), (1, 2, 3))
    assert not bad
    assert images[:, 0, 0, 0].tolist() == [35, 15, 200, 5]
