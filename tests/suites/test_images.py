"""From image files to 8-bit RGB: every kind of file, and every way in which one can be wrong."""

import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mergekit_lite.suites import images
from mergekit_lite.suites.images import check_image, read_image

RAMP = np.arange(64 * 64).reshape(64, 64)
GLYPH = np.zeros((40, 40, 4), np.uint8)
GLYPH[10:30, 10:30, 3] = 255  # black, on a ground that is transparent


YELLOW = np.stack([255 - GLYPH[..., 3], 255 - GLYPH[..., 3], 0 * GLYPH[..., 3]], -1)  # black, on yellow


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


# ---------------------------------------------------------------- grey


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (Image.fromarray((RAMP * 16).astype(np.uint16)), "x.png"),
        (Image.fromarray((RAMP * 16).astype(np.uint16)), "x.tif"),
        (Image.fromarray((RAMP * 16).astype(np.uint16)), "x.pgm"),
        (Image.fromarray((RAMP * 16).astype(np.int32)), "x.tif"),
        (Image.fromarray((RAMP * 16).astype(np.float32)), "x.tif"),
        (Image.fromarray((RAMP // 16).astype(np.float32)), "x.tif"),
        (Image.fromarray((RAMP / 4095).astype(np.float32)), "x.tif"),
        (Image.fromarray((RAMP // 16).astype(np.uint8)), "x.png"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "16-bit PGM", "32-bit TIFF", "floats to 65535", "to 255", "to 1", "8-bit PNG"],
)
def test_a_ramp_from_black_to_white_is_one(tmp_path, image, name):
    pixels = read_image(saved(tmp_path, image, name))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - (RAMP / 4095 * 255)[..., None]).max() <= 1
    assert (pixels[0, 0], pixels[-1, -1]) == (pytest.approx([0, 0, 0]), pytest.approx([255, 255, 255]))


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    dark = read_image(saved(tmp_path, Image.fromarray(np.full((4, 4), 514, np.uint16))))
    assert (dark == 2).all()


def test_a_tiff_that_counts_from_white_is_turned_round(tmp_path):
    path = saved(tmp_path, Image.fromarray((RAMP * 16).astype(np.uint16)), "x.tif", tiffinfo={262: 0})
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("values", [[0.0, float("nan")], [-3.0, 1.0], [0.0, 1e6], [0.0, float("inf")]])
def test_grey_without_a_white_is_said(tmp_path, values):
    path = saved(tmp_path, Image.fromarray(np.array([values], np.float32)), "strange.tif")
    with pytest.raises(ValueError, match=r"strange\.tif' could not be read as an image \(it has grey values from"):
        read_image(path)


# ---------------------------------------------------------------- transparency and colours


def as_palette(rgba):
    palette = Image.fromarray((rgba[..., 3] > 0).astype(np.uint8))
    palette.putpalette([255, 0, 255, 0, 0, 0])
    return palette


@pytest.mark.parametrize(
    ("image", "name", "options"),
    [
        (Image.fromarray(GLYPH), "x.png", {}),
        (Image.fromarray(GLYPH), "x.webp", {"lossless": True}),
        (Image.fromarray(GLYPH), "x.tif", {}),
        (Image.fromarray(GLYPH).convert("LA"), "x.png", {}),
        (as_palette(GLYPH), "x.png", {"transparency": 0}),
        (as_palette(GLYPH), "x.gif", {"transparency": 0}),
        (Image.fromarray(255 - GLYPH[..., 3]), "x.png", {"transparency": 255}),
        (Image.fromarray((GLYPH[..., 3] > 0).astype(np.uint16) * 9), "x.png", {"transparency": 0}),
        (Image.fromarray(YELLOW), "x.png", {"transparency": (255, 255, 0)}),
    ],
    ids=["RGBA", "WEBP", "TIFF", "LA", "palette", "GIF", "grey", "16 bits", "RGB"],
)
def test_a_black_glyph_on_nothing_is_black_on_white(tmp_path, image, name, options):
    pixels = read_image(saved(tmp_path, image, name, **options))
    assert (pixels[:10] == 255).all()
    assert (pixels[12:28, 12:28] <= 1).all()


def test_half_transparent_is_halfway_to_white(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (3, 3), (255, 0, 0, 128)))
    assert np.abs(read_image(path) - np.array([255, 127, 127])).max() <= 1


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "x.tif", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "x.jpg", (254, 0, 0)),
        ("1", 1, "x.png", (255, 255, 255)),
        ("1", 1, "x.bmp", (255, 255, 255)),
        ("L", 7, "x.pgm", (7, 7, 7)),
        ("RGB", (1, 2, 3), "x.ppm", (1, 2, 3)),
        ("P", 0, "x.gif", (0, 0, 0)),
    ],
)
def test_colours_become_rgb(tmp_path, mode, colour, name, expected):
    pixels = read_image(saved(tmp_path, Image.new(mode, (8, 8), colour), name))
    assert np.abs(pixels - np.array(expected)).max() <= 2


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_upright(tmp_path, orientation, name):
    scene = np.zeros((32, 48, 3), np.uint8)
    scene[:16, :24] = 255  # upright, its upper left quarter is white
    turned = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.swapaxes(0, 1),
        6: np.rot90(scene, 1),
        7: scene[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(scene, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_image(saved(tmp_path, Image.fromarray(np.ascontiguousarray(turned)), name, exif=exif))
    assert pixels.shape == (32, 48, 3)
    assert pixels[:12, :20].mean() > 240
    assert pixels[20:].mean() < 15
    assert pixels[:, 28:].mean() < 15


def test_damaged_notes_of_the_camera_do_not_matter(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8), "white"), "x.jpg", exif=b"Exif\x00\x00MM\x00\x2anonsense")
    with warnings.catch_warnings(action="ignore"):
        assert read_image(path).min() > 250


def test_images_are_resized_smoothly(tmp_path):
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    path = saved(tmp_path, board)
    for interpolation in ("bilinear", "bicubic"):
        assert np.abs(read_image(path, 8, interpolation)[2:-2, 2:-2].astype(int) - 127).max() < 12
    assert set(np.unique(read_image(path, 8, "nearest"))) <= {0, 255}


# ---------------------------------------------------------------- files that are wrong


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.bmp", "x.tif", "x.webp", "x.ppm"])
def test_a_file_that_was_cut_is_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    whole = path.read_bytes()
    for length in (0, 1, 20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=r"x\.\w+' could not be read"):
            read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x00" * 99]
)
def test_what_is_no_image_is_not_opened_whatever_it_is_called(tmp_path, content):
    for name in ("x.png", "x.eps"):
        (tmp_path / name).write_bytes(content)
        for look in (read_image, check_image):
            with pytest.raises(ValueError, match=rf"{name}' could not be read .* PNG, JPEG, GIF, BMP, TIFF, WEBP, PPM"):
                look(tmp_path / name)


def test_a_format_that_is_not_named_is_not_opened(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8)), "x.png", format="ICO")
    with pytest.raises(ValueError, match=r"x\.png' could not be read"):
        read_image(path)


def bomb(path, side):
    """A PNG of a few kilobytes that says it is `side` x `side` pixels, and unpacks to them."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10_000_000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [8_001, 9_700, 13_000, 20_000, 2_000_000])
def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_does(tmp_path, side):
    path = bomb(tmp_path / "bomb.png", side)
    tracemalloc.start()
    for look in (read_image, check_image):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(ValueError, match=r"bomb\.png' is too large to unpack .* Make it smaller"),
        ):
            look(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_pillows_own_limit_is_said_in_the_same_way(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("RGB", (30, 30)), "large.png")
    for limit in (100, 800):  # Pillow raises an error above twice its limit, and warns above it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"large\.png' is too large to unpack"):
            read_image(path)


def test_a_limit_is_a_limit(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("RGB", (10, 10)))
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    assert read_image(path).shape == (10, 10, 3)
    monkeypatch.setattr(images, "MOST_PIXELS", 99)
    with pytest.raises(ValueError, match="too large"):
        read_image(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such image: '.*gone\.png'"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"could not be read"):
        read_image(tmp_path)
