"""Read .npz files from anywhere: arrays of bounded size, and images one block at a time; nothing is ever unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from fastmem.errors import InputFileError
from fastmem.quality.frechet import Gaussian

Value = TypeVar("Value")
# numpy writes headers of about 100 bytes
HEADER_BYTES = 10_000
# the name under which guided-diffusion keeps images
IMAGES = "arr_0"
# no feature comes near this, and products of larger numbers would not be finite
LARGEST = 1e30
# how far a covariance may be from symmetric and positive, as a share of its largest entry: float32 rounds by less
SLACK = 1e-4
# a side of an image is no longer than this
MOST_PIXELS = 4096


@dataclass(frozen=True)
class ArrayHeader:
    """What an array in a .npz file is, without its numbers.

    Attributes:
        member: the array's name in the zip.
        shape: its shape.
        dtype: its type.
        transposed: whether the first index runs fastest.
        checksum: CRC-32 of the member.
        start: number of bytes before the numbers.
    """

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    transposed: bool
    checksum: int
    start: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)!s:.60}"


def holds_arrays(path: Path) -> bool:
    """Return whether a file is a .npz, by its name or, as a zip with arrays, by its content."""
    if path.suffix.lower() == ".npz":
        return True
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    return any(name in ("mu.npy", f"{IMAGES}.npy") for name in _guarded(path, lambda: _members(path)))


def array_headers(path: Path) -> dict[str, ArrayHeader]:
    """Return the headers of those arrays of a .npz file that a reference may hold: mu, sigma and arr_0, by name.

    Raises: InputFileError where the file is missing, is no .npz, or has a damaged header or one of objects.
    """
    if not path.is_file():
        raise InputFileError(f"expected reference statistics at {path}, got no such file: check the path")
    members = _guarded(path, lambda: _members(path))
    wanted = [name for name in ("mu", "sigma", IMAGES) if f"{name}.npy" in members]
    if "mu" in wanted and "sigma" in wanted:
        # statistics come first, and an array beside them may be anything
        wanted = ["mu", "sigma"]
    return {name: _guarded(path, lambda name=name: _header(path, f"{name}.npy")) for name in wanted}  # type: ignore[misc]


def read_statistics(path: Path, dimensions: int) -> Gaussian:
    """Read reference statistics from a .npz file: its arrays ``mu`` [D] and ``sigma`` [D,D], where D is ``dimensions``.

    Raises: InputFileError where the file is missing or damaged, or lacks an array, or where an array has another shape
    or type, a value that is not finite, or ``sigma`` is no covariance.

    Source: openai/guided-diffusion evaluations/evaluator.py.
    """
    headers = array_headers(path)
    missing = [name for name in ("mu", "sigma") if name not in headers]
    if missing:
        there = ", ".join(f"{name} {header}" for name, header in headers.items()) or "neither"
        raise InputFileError(
            f"expected arrays mu and sigma in {path}, got {there}: give statistics, or images as {IMAGES}"
        )
    shapes = {name: header.shape for name, header in headers.items()}
    if shapes != {"mu": (dimensions,), "sigma": (dimensions, dimensions)}:
        raise InputFileError(
            f"expected mu [{dimensions}] and sigma [{dimensions},{dimensions}] in {path}, got mu "
            f"{list(shapes['mu'])!s:.60} and sigma {list(shapes['sigma'])!s:.60}: use statistics of the same features"
        )
    mu, sigma = (_numbers(path, headers[name]) for name in ("mu", "sigma"))
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise InputFileError(f"expected finite numbers in {path}, got values that are not finite: make it again")
    largest = max(float(np.abs(sigma).max()), float(np.abs(mu).max()))
    if largest > LARGEST:
        raise InputFileError(f"expected statistics of features in {path}, got numbers of {largest:.1e}: is it whole?")
    _check_covariance(path, sigma)
    return Gaussian(mu, (sigma + sigma.T) / 2)


def rank(sigma: np.ndarray) -> int:
    """Return the number of dimensions in which a covariance, float64 [D,D], has a variance above rounding."""
    values = np.linalg.eigvalsh(sigma)
    return int((values > values.max() * len(values) * np.finfo(np.float64).eps).sum())


def _check_covariance(path: Path, sigma: np.ndarray) -> None:
    scale = float(np.abs(sigma).max())
    fault = ""
    if float(np.abs(sigma - sigma.T).max()) > SLACK * scale:
        fault = "one that is not symmetric"
    elif float(np.trace(sigma)) <= 0:
        fault = "one without any variance"
    elif float(np.linalg.eigvalsh((sigma + sigma.T) / 2).min()) < -SLACK * scale:
        fault = "one with negative variances"
    if fault:
        raise InputFileError(f"expected a covariance sigma in {path}, got {fault}: make the statistics again")


def image_header(path: Path) -> ArrayHeader:
    """Return the header of the images in a .npz file, its array ``arr_0``: uint8 [N,S,S,3].

    Raises: InputFileError where there is no such array, or it is no array of images.
    """
    found = array_headers(path).get(IMAGES)
    if found is None:
        raise InputFileError(
            f"expected arrays mu and sigma, or images as {IMAGES}, in {path}, got neither: check the file"
        )
    fits = found.dtype == np.uint8 and len(found.shape) == 4 and found.shape[3] == 3 and not found.transposed
    if not fits or found.shape[1] != found.shape[2] or min(found.shape) < 1:
        hint = "features alone do not say of which network they are" if found.dtype.kind == "f" else "check the file"
        raise InputFileError(f"expected images as uint8 [N,S,S,3] in {path}, got {IMAGES} {found}: {hint}")
    if found.shape[1] > MOST_PIXELS:
        raise InputFileError(
            f"expected images of at most {MOST_PIXELS} pixels a side in {path}, got {IMAGES} {found}: check the file"
        )
    return found


def image_blocks(path: Path, header: ArrayHeader, first: int, last: int, size: int) -> Iterator[np.ndarray]:
    """Yield the images from ``first`` up to but without ``last`` in blocks, uint8 [n,S,S,3].

    Args:
        path: the .npz file.
        header: the array of images.
        first: position of the first image.
        last: position after the last image.
        size: largest number of images in a block.

    Raises: InputFileError where the file is damaged or ends early.
    """
    each = int(np.prod(header.shape[1:]))
    archive, member = _guarded(path, lambda: _opened(path, header.member))
    with archive, member:
        _guarded(path, lambda: member.seek(header.start + first * each))
        for start in range(first, last, size):
            count = min(size, last - start)
            content = _guarded(path, lambda count=count: member.read(count * each))  # type: ignore[misc]
            if len(content) < count * each:
                raise InputFileError(f"expected {header.shape[0]} images in {path}, got a file that ends early")
            yield np.frombuffer(content, np.uint8).reshape(count, *header.shape[1:])


def _numbers(path: Path, header: ArrayHeader) -> np.ndarray:
    """Return the numbers of an array, float64."""
    if header.dtype.kind not in "fiu":
        raise InputFileError(f"expected numbers in {path}, got {header.member} of {header}: it cannot be used")
    size = int(np.prod(header.shape)) * header.dtype.itemsize

    def read() -> np.ndarray:
        archive, member = _opened(path, header.member)
        with archive, member:
            # one byte more than there should be, so that the checksum is looked at
            content = member.read(header.start + size + 1)
        return np.lib.format.read_array(BytesIO(content), allow_pickle=False).astype(np.float64)

    return _guarded(path, read)


def _header(path: Path, name: str) -> ArrayHeader:
    archive, member = _opened(path, name)
    with archive, member:
        begin = member.read(12)
        # the length stands in two bytes in version 1, and in four in later ones
        short = begin[6:7] == b"\x01"
        start = 10 + int.from_bytes(begin[8:10], "little") if short else 12 + int.from_bytes(begin[8:12], "little")
        if start > HEADER_BYTES:
            raise ValueError(f"a header of {start:,} bytes")
        content = BytesIO(begin + member.read(max(0, start - len(begin))))
        version = np.lib.format.read_magic(content)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, transposed, dtype = reader(content, max_header_size=HEADER_BYTES)
        return ArrayHeader(name, shape, dtype, transposed, archive.getinfo(name).CRC, start)


def _members(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _opened(path: Path, name: str) -> tuple[zipfile.ZipFile, IO[bytes]]:
    archive = zipfile.ZipFile(path)
    try:
        return archive, archive.open(name)
    except BaseException:
        archive.close()
        raise


def _guarded(path: Path, call: Callable[[], Value]) -> Value:
    """Return what a call of a library on a file gives; whatever it raises becomes one sentence.

    Raises: InputFileError where the call raises anything.
    """
    try:
        return call()
    # zip and numpy raise many kinds of errors over damaged files
    except Exception as error:
        raise InputFileError(
            f"expected a .npz file with arrays mu and sigma, or images as {IMAGES}, in {path}, got one that cannot be "
            f"used ({type(error).__name__}: {' '.join(str(error).split())[:120]}): download it again"
        ) from error
