"""Turning untrusted image bytes into RGB pictures, within limits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from fastmem.errors import InputFileError

MAX_PIXELS = 100_000_000
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
# pillow would otherwise try every format it knows, among them ones that start other programs (EPS)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True)
class Skipped:
    """One file that takes no part, with its ``class/name`` and the reason."""

    name: str
    reason: str


class DamagedImage(InputFileError):
    """An image that cannot be used; ``reason`` says why and ``name`` which one, where that is known."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason, name)
        self.reason = reason
        self.name = name

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.name else self.reason


def check_pixels(width: int, height: int, name: str = "") -> None:
    """Refuse a picture size that is empty or above the limit of 100 million pixels.

    Raises:
        DamagedImage: ``width`` x ``height`` is out of bounds.
    """
    if width < 1 or height < 1:
        raise DamagedImage(f"empty: {width}x{height} pixels", name)
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"huge: {width}x{height} pixels, the limit is {MAX_PIXELS}", name)


def decode(file: BinaryIO, name: str = "") -> Image.Image:
    """Decode the first frame of an image file as RGB.

    The conversion is Pillow's ``convert("RGB")`` and EXIF orientation is ignored, as in the published pipelines: alpha
    is dropped, not composited, and 16-bit grey is cut to 8 bits as Pillow does it.

    Raises:
        DamagedImage: the file is empty, not an image, truncated, damaged, or above the pixel limit.
    """
    try:
        if not file.read(1):
            raise DamagedImage("empty file", name)
        file.seek(0)
        # pillow warns about odd metadata and at a pixel limit of its own; neither changes the pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                check_pixels(*image.size, name)
                return image.convert("RGB")
    except DamagedImage:
        raise
    except UnidentifiedImageError as error:
        raise DamagedImage(f"not an image that can be read (expected {', '.join(FORMATS)})", name) from error
    except Image.DecompressionBombError as error:
        raise DamagedImage(f"huge: more than {MAX_PIXELS} pixels", name) from error
    # decoders raise whatever the damage makes them trip over, from SyntaxError to MemoryError
    except Exception as error:
        raise DamagedImage(f"damaged: {error or type(error).__name__}", name) from error
