"""Sources of images: a folder, a zip file, shards or an array, with a label and a stable id for every image.

A folder or zip file holds one folder per class. Its images are listed once, sorted by label and name. An image's name
is ``class/`` and its path below the class folder, and its id is a hash of that name, so the id depends neither on where
the images lie nor on which other images lie there.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from fastmem.data.class_order import MAX_UNNAMED_CLASSES, Classes, in_label_order
from fastmem.data.decoding import DamagedImage, decode
from fastmem.data.listing import (
    ZipPlace,
    folder_names,
    list_folder,
    list_members,
    members_prefix,
    mode_at,
    no_split,
    open_zip,
    regular,
    unzip,
    zip_members,
)
from fastmem.data.parquet_source import ParquetSource
from fastmem.data.shards import PARQUET, TOKENS, Pattern, Shards, is_pattern, is_shard, shards_in
from fastmem.data.source import DIGEST_BYTES, EMBEDDED, IN_MEMORY, ImageSource, content_hash, image_ids
from fastmem.data.tar_source import TarSource
from fastmem.data.token_source import TokenSource, code_folders
from fastmem.errors import InputFileError, UsageError

__all__ = [
    "DIGEST_BYTES",
    "EMBEDDED",
    "IN_MEMORY",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "ParquetSource",
    "TarSource",
    "TokenSource",
    "ZipSource",
    "embedded_source",
    "image_ids",
    "open_source",
]

# files are read in blocks of this size to be hashed
_HASHED_BYTES = 2**20


class FolderSource(ImageSource):
    """Images in a folder with one folder per class: ``path/[split/]CLASS/**/NAME.ext``.

    Args:
        path: the folder.
        split: folder below ``path`` that holds the class folders, ``""`` for ``path`` itself; by default ``train``
            where there is one, else ``path`` itself.
        classes: class folder names in label order, or a text file with one per line; by default sorted folder names.

    Raises:
        InputFileError: the folder or the text file of classes is missing or cannot be read.
        UsageError: there is no such split, no image in a class folder, or ``classes`` lacks a class or names it twice.
    """

    def __init__(self, path: str | os.PathLike[str], split: str | None = None, classes: Classes | None = None) -> None:
        root = Path(path)
        if not stat.S_ISDIR(mode_at(root, "a folder of images")):
            raise UsageError(f"expected a folder of images at {root}, got a file; give a folder or a .zip file")
        folder = root / split if split is not None else root / "train"
        if split is None and not os.path.isdir(folder):
            folder = root
        if not os.path.isdir(folder):
            raise UsageError(no_split(split or "", root, folder_names(root)))
        self.folder = folder
        self.place, self.split = os.path.abspath(root), split
        found, skipped = list_folder(folder)
        names, labels, ordered = in_label_order(found, skipped, classes, f"folder {folder}", guess=split is None)
        super().__init__(names, labels, ordered, skipped, f"folder {folder}")

    def read(self, index: int) -> Image.Image:
        with self._opened(index) as file:
            return decode(file, str(self.names[index]))

    def digest(self, index: int) -> bytes:
        with self._opened(index) as file:
            return content_hash(iter(partial(file.read, _HASHED_BYTES), b""))

    @contextmanager
    def _opened(self, index: int) -> Iterator[BinaryIO]:
        name = str(self.names[index])
        try:
            # what has become a pipe since it was listed would never open, or never end
            with open(self.folder / name, "rb", opener=regular) as file:
                yield file
        except OSError as error:
            if not os.path.isdir(self.folder):
                raise InputFileError(
                    f"expected the folder of images {self.folder} until the end, got none any more; bring it back and "
                    "run again"
                ) from error
            raise DamagedImage(f"cannot be read: {error.strerror or error}", name) from error


class ZipSource(ImageSource):
    """Images in a zip file with one folder per class, read in place and never unpacked to disk.

    A single folder that encloses all class folders is not taken for a class.

    Args:
        path: the zip file.
        split: folder in the zip that holds the class folders, ``""`` for none; by default ``train`` where there is one.
        classes: class folder names in label order, or a text file with one per line; by default sorted folder names.

    Raises:
        InputFileError: the zip file or the text file of classes is missing or damaged.
        UsageError: there is no such split, no image in a class folder, or ``classes`` lacks a class or names it twice.
    """

    def __init__(self, path: str | os.PathLike[str], split: str | None = None, classes: Classes | None = None) -> None:
        self.path = Path(path)
        self._shards = Shards([self.path])
        with open_zip(self.path) as archive:
            self._shards.size(0)
            self._shards.close()
            # a million entries of the directory take most of a GB, so each goes as soon as it is read
            archive.NameToInfo.clear()
            members, places = zip_members(_emptied(archive.infolist()))
        self._prefix = members_prefix(members, split, str(self.path))
        description = f"zip {self.path}" + (f":{self._prefix[:-1]}" if self._prefix else "")
        found, skipped, numbers = list_members(members, self._prefix)
        names, labels, ordered = in_label_order(found, skipped, classes, description, guess=split is None)
        # where each image lies, so that no process has to read the zip's directory again
        self._places = places[np.array([numbers[name] for name in names], dtype=np.int64)]
        super().__init__(names, labels, ordered, skipped, description)
        self.place, self.split = os.path.abspath(path), split

    def read(self, index: int) -> Image.Image:
        return decode(BytesIO(self._content(index)), str(self.names[index]))

    def digest(self, index: int) -> bytes:
        return content_hash([self._content(index)])

    def _content(self, index: int) -> bytes:
        name, place = str(self.names[index]), ZipPlace(*self._places[index].tolist())
        try:
            content = unzip(place, self._prefix + name, partial(self._shards.read, 0))
        except (OSError, ValueError, zlib.error) as error:
            raise DamagedImage(f"damaged in the zip: {error or type(error).__name__}", name) from error
        if content is None:
            raise DamagedImage("not in the zip any more", name)
        return content


def _emptied(entries: list[zipfile.ZipInfo]) -> Iterator[zipfile.ZipInfo]:
    """Yield the entries of a list, and take them out of it."""
    entries.reverse()
    while entries:
        yield entries.pop()


class ArraySource(ImageSource):
    """Images that are already in memory.

    Args:
        images: uint8 [N, S, S, 3] in [0, 255].
        labels: integers [N], from 0.
        ids: integers [N] from 0, different for every image; by default hashes of the names. A name is ``CLASS/`` and
            the position in eight digits.
        classes: class names in label order; by default the labels as text.

    Raises:
        UsageError: an array has another shape, type or range, or two ids are equal.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | Sequence[int],
        ids: np.ndarray | Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        images = np.asarray(images)
        shape = images.shape
        if images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or not images.size:
            raise UsageError(
                f"expected images as uint8 [N, S, S, 3], got {images.dtype} {list(shape)}; "
                "convert them to RGB bytes with the channel last"
            )
        labels = _whole_numbers(labels, len(images), "labels")
        if classes is None and labels.max() >= MAX_UNNAMED_CLASSES:
            raise UsageError(
                f"expected labels below {MAX_UNNAMED_CLASSES}, got {labels.max()}; number the classes from 0"
            )
        classes = tuple(map(str, range(labels.max() + 1))) if classes is None else tuple(classes)
        if labels.max() >= len(classes):
            raise UsageError(
                f"expected labels below {len(classes)}, the number of classes, got {labels.max()}; name every class"
            )
        names = [f"{classes[label]}/{position:08d}" for position, label in enumerate(labels)]
        self._images = images
        size = f"{shape[1]}x{shape[2]}"
        ids = None if ids is None else _whole_numbers(ids, len(images), "ids")
        super().__init__(names, labels, classes, (), f"array of {len(images)} images, {size}", ids)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])


def open_source(path: Pattern, split: str | None = None, classes: Classes | None = None) -> ImageSource:
    """Open the images at ``path``: a folder, a zip file, tar or parquet files, or a pattern or a list of these.

    A file is taken for what its content is. In a folder of tar or parquet files, those whose names begin with the split
    are taken.

    Args:
        path: a path, a pattern of shards as in `fastmem.data.shards`, or a list of paths.
        split: the folder below ``path``, or in the archive, that holds the class folders; by default ``train`` where
            there is one.
        classes: the class names in label order, or a text file of them.

    Raises:
        InputFileError: nothing is at ``path``, or it is damaged.
        UsageError: something else is at ``path``, or no image has a class.
    """
    one = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if one is not None and (os.path.exists(one) or not is_pattern(one)):
        place = Path(one)
        mode = mode_at(place, "a folder, a zip file or shards of images")
        if stat.S_ISDIR(mode):
            if code_folders(place) is not None:
                return _open_tokens(place, split, classes)
            shards = shards_in(place, split)
            if not shards:
                return FolderSource(place, split, classes)
            source = _open_shards(shards, None, classes)
            source.place, source.split = os.path.abspath(place), split
            return source
        if not stat.S_ISREG(mode):
            return FolderSource(place, split, classes)
        if place.suffix.lower() == ".zip" or zipfile.is_zipfile(place):
            return ZipSource(place, split, classes)
        if not is_shard(place):
            raise UsageError(
                f"expected a folder of images at {place}, got a file; give a folder or a .zip file, or .tar or "
                ".parquet files"
            )
    return _open_shards(path, split, classes)


def _open_shards(pattern: Pattern, split: str | None, classes: Classes | None) -> ImageSource:
    """Open shards as what the first of them is; see ``open_source`` for the errors."""
    shards = Shards(pattern)
    kind = shards.kind(0)
    if kind == TOKENS:
        return _open_tokens(pattern, split, classes)
    if kind != PARQUET:
        # the list of a tar file says best what is wrong with a file that is none
        return TarSource(pattern, split, classes)
    if split:
        raise UsageError(f"expected no split of the parquet file {shards.paths[0]}, got {split!r}; name its shards")
    return ParquetSource(pattern, classes)


def _open_tokens(path: Pattern, split: str | None, classes: Classes | None) -> TokenSource:
    if split:
        raise UsageError(f"expected no split of the tokens {path}, got {split!r}; name the files of the split")
    return TokenSource(path, classes)


def embedded_source(split: str) -> ZipSource:
    """Open images that come with the package: ``train`` (823) or ``heldout`` (192), 64x64 pixels, 41 classes.

    Raises:
        UsageError: there is no such split.
    """
    source = ZipSource(Path(__file__).resolve().parent.parent / "demo" / "emoji64.zip", split)
    source.place = EMBEDDED
    return source


def _whole_numbers(values: np.ndarray | Sequence[int], count: int, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 2**63 - 1:
        raise UsageError(
            f"expected {what} as {count} integers in [0, 2**63), got {array.dtype} {list(array.shape)} from "
            f"{array.min() if array.size else None}; give one per image"
        )
    return array.astype(np.int64)
