"""One way from an image file to 8-bit RGB pixels, whatever the file holds.

Photos are turned upright as their camera says, transparent images are laid on white paper, grey images of 16 bits
are scaled to 0 .. 255, and palettes, CMYK and black-and-white become RGB. Only the formats named here are opened,
whatever a file is called: others would start programs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lite.types import PathLike

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# A file of a few kilobytes can unpack to gigabytes. So many pixels take one, if they have transparency.
MOST_PIXELS = 64_000_000
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")

# What a camera writes into its file: how the picture must be turned to be upright. 1 is upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def read_image(path: PathLike, size: int | None = None, interpolation: str = "bicubic") -> np.ndarray:
    """The pixels of an image file; of an animation, those of its first picture.

    Args:
        path: an image file, in one of the `FORMATS`.
        size: height and width that the image is resized to, in pixels; by default it keeps its own.
        interpolation: {"nearest", "bilinear", "bicubic"}; the last two average over pixels where the image shrinks.

    Returns:
        RGB values 0 .. 255, uint8, shape (H, W, 3).

    Raises:
        ValueError: the file is missing, damaged, too large or no image; the message names it.
    """
    from PIL.Image import Resampling, Transpose

    with _opened(path) as image:
        image.load()
        pixels = _on_white(_eight_bits(image))
        if (turn := _TURNS.get(_orientation(image))) is not None:
            pixels = pixels.transpose(Transpose[turn])
        if size is not None:
            pixels = pixels.resize((size, size), Resampling[interpolation.upper()])
        return np.array(pixels)


@cache
def suffixes() -> frozenset[str]:
    """The endings of image files' names, in small letters: ``.png``, ``.jpg`` and so on."""
    from PIL import Image

    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def check_image(path: PathLike) -> None:
    """Look at the beginning of an image file only: is it one, and not too large?

    Raises:
        ValueError: as `read_image`; damage further on in the file is not noticed.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: PathLike) -> Iterator[Image]:
    """An open image whose pixels have not been decoded; whatever goes wrong with it is said with its name."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise _too_large(path, f"{image.width:,} x {image.height:,} pixels")
            yield image
    except ImageError:
        raise
    except FileNotFoundError as problem:
        raise ImageError(f"no such image: '{path}'. Check the path.") from problem
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as problem:
        raise _too_large(path, str(problem) or "more than the memory holds") from problem
    except Exception as problem:  # the errors of the many decoders have no common class
        raise ImageError(
            f"'{path}' could not be read as an image ({problem}). It is damaged or of another format than "
            f"{', '.join(FORMATS)}: save it anew, or take it out of the folder."
        ) from problem


def _too_large(path: PathLike, size: str) -> ImageError:
    return ImageError(
        f"'{path}' is too large to unpack ({size}; at most {MOST_PIXELS:,} pixels are read). "
        "Make it smaller, or take it out of the folder."
    )


def _eight_bits(image: Image) -> Image:
    """Grey images of 16 or 32 bits scaled to 8; other images as they are."""
    from PIL.Image import fromarray

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    lowest, highest = float(values.min()), float(values.max())
    white = _white(image, highest)
    if not 0 <= lowest <= highest <= white:  # NaN is not, either
        raise ValueError(f"it has grey values from {lowest:g} to {highest:g}, of which none is known to be white")
    grey = (values * np.float32(255 / white) + np.float32(0.5)).astype(np.uint8)
    if _tag(image, 262) == 0:  # PhotometricInterpretation: a TIFF that counts from white to black
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):  # the grey value that is transparent
        grey[values == clear] = 255
    return fromarray(grey)


def _white(image: Image, highest: float) -> float:
    """The value that means white: by the number of bits, or where 32 bits leave it open, the least that will do."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, 258)  # BitsPerSample: some TIFFs have 12
        return float(2 ** (bits[0] if bits else 16) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535.0
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if highest <= white), usual[-1])


def _tag(image: Image, number: int) -> Any:
    """The value of a TIFF's tag; None for other formats."""
    return getattr(image, "tag_v2", {}).get(number)


def _orientation(image: Image) -> int:
    """How the camera was held, 1 .. 8; 1 if the file does not say."""
    from PIL.ExifTags import Base

    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except Exception:  # damaged notes of the camera: the picture itself can be read
        return 1


def _on_white(image: Image) -> Image:
    """RGB; where the image is transparent, white shines through."""
    from PIL.Image import alpha_composite, new

    if image.mode == "La":  # colours multiplied by their opacity, as in some TIFFs
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return alpha_composite(new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
