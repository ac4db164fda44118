"""Decode image files from untrusted sources as RGB pictures of limited size."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from fastmem.errors import InputFileError

MAX_PIXELS = 100_000_000
# a larger file is left out; 100 million pixels of 8 bytes, not compressed, are smaller
MAX_FILE_BYTES = 2**30
# those of torchvision's ImageFolder, and GIF
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
# without this list pillow tries every format it knows, and for some (EPS) it starts other programs
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_PNG_START = b"\x89PNG\r\n\x1a\n"
# chunks of a PNG that hold text, a colour profile or camera data, and no pixels
_PNG_METADATA = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"))


@dataclass(frozen=True)
class Skipped:
    """A file that was left out: its name, ``class/name``, and the reason."""

    name: str
    reason: str


class DamagedImage(InputFileError):
    """An image that cannot be used: ``reason`` says why, and ``name`` is its ``class/name`` or empty if unknown."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason, name)
        self.reason = reason
        self.name = name

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.name else self.reason


def check_pixels(width: int, height: int, name: str = "") -> None:
    """Raise an error for a picture without pixels or with more than 100 million of them.

    ``width`` and ``height`` are in pixels, and ``name`` names the picture in the message.

    Raises:
        DamagedImage: the picture is empty or too large.
    """
    if width < 1 or height < 1:
        raise DamagedImage(f"empty: {width}x{height} pixels", name)
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"huge: {width}x{height} pixels, the limit is {MAX_PIXELS}", name)


def decode(file: BinaryIO, name: str = "") -> Image.Image:
    """Decode the first frame of an image file as RGB; ``name`` names the image in error messages.

    As in the published training code, Pillow's ``convert("RGB")`` is used and EXIF orientation is ignored. It drops
    an alpha channel without blending and reduces 16-bit grey to 8 bits.

    Raises:
        DamagedImage: the file is empty, not an image, truncated, damaged, or above a limit.
    """
    try:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not size:
            raise DamagedImage("empty file", name)
        if size > MAX_FILE_BYTES:
            raise DamagedImage(f"huge: {size} bytes, the limit is {MAX_FILE_BYTES}", name)
        # pillow warns about odd metadata and about a pixel limit of its own, which do not change the pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(_without_metadata(file), formats=FORMATS) as image:
                check_pixels(image.width, image.height, name)
                return image.convert("RGB")
    except DamagedImage:
        raise
    except UnidentifiedImageError as error:
        raise DamagedImage(f"not an image that can be read (expected {', '.join(FORMATS)})", name) from error
    except Image.DecompressionBombError as error:
        raise DamagedImage(f"huge: more than {MAX_PIXELS} pixels", name) from error
    # on a damaged file pillow's decoders raise exceptions of many kinds, from SyntaxError to MemoryError
    except Exception as error:
        # only the system's errors have a number: the disk, not the file, has failed
        if isinstance(error, OSError) and error.errno is not None:
            raise DamagedImage(f"cannot be read: {error.strerror or error}", name) from error
        raise DamagedImage(f"damaged: {error or type(error).__name__}", name) from error


def _without_metadata(file: BinaryIO) -> BinaryIO:
    """Return a PNG without its metadata, which Pillow refuses where it is large, and any other file as it is."""
    start = file.read(len(_PNG_START))
    if start != _PNG_START:
        file.seek(0)
        return file
    kept = io.BytesIO()
    kept.write(start)
    # a chunk is its length in four bytes, its kind in four, the content, and a check sum of four bytes
    while len(header := file.read(8)) == 8:
        rest = int.from_bytes(header[:4], "big") + 4
        if header[4:] in _PNG_METADATA:
            file.seek(rest, io.SEEK_CUR)
        else:
            kept.write(header)
            kept.write(file.read(rest))
    kept.write(header)
    kept.seek(0)
    return kept
