"""Tokens in place of images: those that RAR's and LlamaGen's training code writes before training.

RAR's is a text file with one JSON document a line, `{"class_id": 3, "tokens": [...]}`, one line for a crop, and the ten
crops of an image one after the other. LlamaGen's are two folders, `NAME_codes` and `NAME_labels`, with files of numpy
for each image: codes [1, V, T] and a label [1]. Both cut ten crops in torchvision's order: the four corners, the
centre, and the same of the mirrored image.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from fastmem.data.class_order import Classes, in_label_order, numbered_classes
from fastmem.data.decoding import DamagedImage
from fastmem.data.listing import regular
from fastmem.data.shards import Pattern, Shards, is_remote, place_of
from fastmem.data.source import ImageSource, content_hash
from fastmem.errors import InputFileError, UsageError

TEN = 10
CODES, LABELS = "_codes", "_labels"
_START = re.compile(rb'\s*\{\s*"class_id"\s*:\s*(\d{1,9})\s*[,}]')
_FILE = re.compile(r"(0|[1-9]\d{0,11})\.npy")
# larger lines or files hold no tokens of an image: 20 crops of 4,096 tokens take less
_MAX_BYTES = 2**23


class NoPixels(UsageError):
    """The pixels of an image were asked for where only its tokens are stored."""


class TokenSource(ImageSource):
    """Tokens of images that were encoded before, with their labels; there are no pixels, and no names but numbers.

    Args:
        path: RAR's .jsonl files, as a path or a pattern; or the folder of LlamaGen's folders of codes and labels.
        classes: class names in label order, or a text file with one per line; they name the labels by position.
        views: crops of an image that follow one another in a .jsonl file; None for ten.

    Attributes:
        views: crops of an image, V.

    Raises:
        InputFileError: a file is missing or damaged.
        UsageError: lines are not in groups of one class, or ``classes`` does not fit.
    """

    def __init__(self, path: Pattern, classes: Classes | None = None, views: int | None = None) -> None:
        folders = code_folders(Path(path)) if isinstance(path, (str, os.PathLike)) else None
        self._folder: Path | None = None
        self._shards: Shards | None = None
        # for each image its label, and for one in a text file where its lines are
        labels, numbers = array("q"), array("q")
        shard, start, size = array("q"), array("q"), array("q")
        if folders is not None:
            self._folder = folders[0]
            self.views = 0
            description = f"tokens {folders[0]}"
            for number, label in _labels_in(*folders):
                numbers.append(number)
                labels.append(label)
        else:
            self._shards = Shards(path)
            self.views = TEN if views is None else views
            if self.views < 1:
                raise UsageError(f"expected at least 1 view of each image, got {views}; leave it out for ten")
            others = f" and {len(self._shards) - 1} others" if len(self._shards) > 1 else ""
            description = f"tokens {self._shards.paths[0]}{others}"
            for place in range(len(self._shards)):
                for first, length, label in _groups(self._shards, place, self.views):
                    numbers.append(len(numbers))
                    labels.append(label)
                    shard.append(place)
                    start.append(first)
                    size.append(length)
        if not labels:
            raise UsageError(f"expected tokens of images in {description}, got none; check the path")
        by_number, order = numbered_classes(sorted(set(labels)), None, classes, description)
        found: dict[str, list[str]] = {}
        for number, label in zip(numbers, labels, strict=True):
            found.setdefault(by_number[label], []).append(f"{number:08d}")
        names, of_class, ordered = in_label_order(found, (), order, description, guess=False)
        self._number = np.array([int(name.rpartition("/")[2]) for name in names], np.int64)
        # numbers of images in a text file are positions there
        at = self._number if start else np.zeros(0, np.int64)
        self._shard, self._start, self._size = (np.array(values, np.int64)[at] for values in (shard, start, size))
        super().__init__(names, of_class, ordered, (), description)
        self.place = place_of(path)
        if not self.views:
            self.views = len(self.tokens(0))

    def tokens(self, index: int) -> np.ndarray:
        """Return the tokens of the crops of the image at position ``index``: int64 [V, T].

        Raises:
            DamagedImage: they are damaged, or other crops than those of the first image.
        """
        name = str(self.names[index])
        try:
            found = _codes(self._folder, int(self._number[index])) if self._folder else self._lines(index)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise DamagedImage(f"damaged tokens: {error}", name) from error
        if found.ndim != 2 or not found.size or found.min() < 0 or (self.views and len(found) != self.views):
            raise DamagedImage(f"damaged tokens: {list(found.shape)}, expected [{self.views or 'views'}, tokens]", name)
        return found

    def _lines(self, index: int) -> np.ndarray:
        assert self._shards is not None
        shard, start, size = (int(values[index]) for values in (self._shard, self._start, self._size))
        rows = self._shards.read(shard, start, size).splitlines()
        return np.array([_tokens_of(row) for row in rows if row.strip()], dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        raise NoPixels(
            f"expected images, got their tokens alone in {self.description}: this step needs pixels, so give the "
            "images themselves"
        )

    def digest(self, index: int) -> bytes:
        return content_hash([self.tokens(index).tobytes()])


def code_folders(path: Path) -> tuple[Path, Path] | None:
    """Return LlamaGen's folders of codes and of labels, where ``path`` is the first or the folder of both."""
    codes = [path] if path.name.endswith(CODES) else sorted(path.glob(f"*{CODES}"))
    pairs = [(one, one.with_name(one.name.removesuffix(CODES) + LABELS)) for one in codes]
    pairs = [pair for pair in pairs if all(one.is_dir() for one in pair)]
    if len(pairs) > 1:
        raise UsageError(f"expected one folder of codes in {path}, got {len(pairs)}; name the one to read")
    return pairs[0] if pairs else None


def is_token_text(start: bytes) -> bool:
    """Return whether a file that begins so is a text file of tokens."""
    return _START.match(start) is not None


def _groups(shards: Shards, number: int, views: int) -> Iterator[tuple[int, int, int]]:
    """Yield for each image where its lines begin, their bytes, and its class."""
    path = shards.paths[number]
    shards.size(number)
    # a large text is read through a buffer
    opened: Any = shards.file(number) if is_remote(path) else open(path, "rb", opener=regular)  # noqa: SIM115
    try:
        opened.seek(0)
        first = place = count = 0
        label = -1
        for line_number, line in enumerate(iter(lambda: opened.readline(_MAX_BYTES), b""), 1):
            start, place = place, place + len(line)
            if not line.strip():
                continue
            own = _class_of(line, path, line_number)
            if count == 0:
                first, label = start, own
            elif own != label:
                raise UsageError(
                    f"expected the {views} crops of an image one after the other in {path}, got classes {label} and "
                    f"{own} up to line {line_number}: give views= as they were written, 1 for a line an image"
                )
            count += 1
            if count == views:
                yield first, place - first, label
                count = 0
    except OSError as error:
        raise InputFileError(f"expected a file that can be read at {path}, got {error}; check the path") from error
    finally:
        if not is_remote(path):
            opened.close()
    if count:
        raise InputFileError(
            f"expected {views} lines for every image in {path}, got {count} for the last one; copy it again, or give "
            "views= as they were written"
        )


class _Line(msgspec.Struct):
    class_id: int
    tokens: Any


def _class_of(line: bytes, path: str, number: int) -> int:
    quick = _START.match(line)
    if quick is not None:
        return int(quick[1])
    try:
        label = msgspec.json.decode(line, type=_Line).class_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputFileError(
            f'expected {{"class_id": ..., "tokens": [...]}} in line {number} of {path}, got something else ({error}); '
            "copy it again"
        ) from error
    if not 0 <= label < 2**31:
        raise InputFileError(f"expected a class from 0 in line {number} of {path}, got {label}; copy it again")
    return label


def _tokens_of(line: bytes) -> np.ndarray:
    found = np.array(msgspec.json.decode(line, type=_Line).tokens)
    if found.dtype.kind not in "iu":
        raise ValueError("they are no whole numbers")
    return found.reshape(-1)


def _labels_in(codes: Path, labels: Path) -> Iterator[tuple[int, int]]:
    """Yield the number of every image and its label."""
    names: list[set[str]] = []
    for folder in (codes, labels):
        try:
            names.append({name for name in os.listdir(folder) if _FILE.fullmatch(name)})
        except OSError as error:
            raise InputFileError(
                f"expected a folder at {folder}, got {error.strerror}; check its permissions"
            ) from error
    if names[0] != names[1]:
        other = min(names[0] ^ names[1])
        raise InputFileError(f"expected codes and a label of every image in {codes.parent}, got one of {other} alone")
    for name in sorted(names[0], key=lambda name: int(name[:-4])):
        try:
            label = _numbers(labels / name)
        except (OSError, ValueError) as error:
            raise InputFileError(f"expected a label in {labels / name}, got {error}; copy it again") from error
        if label.size != 1 or not 0 <= int(label.reshape(-1)[0]) < 2**31:
            raise InputFileError(
                f"expected one label from 0 in {labels / name}, got {label.tolist()!s:.40}; copy it again"
            )
        yield int(name[:-4]), int(label.reshape(-1)[0])


def _codes(folder: Path, number: int) -> np.ndarray:
    found = _numbers(folder / f"{number}.npy")
    return found[0] if found.ndim == 3 and len(found) == 1 else found


def _numbers(path: Path) -> np.ndarray:
    """Return the whole numbers in a file of numpy. Raises: OSError, ValueError."""
    with open(path, "rb", opener=regular) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    try:
        found = np.load(BytesIO(content), allow_pickle=False)
    # a damaged header makes the library raise exceptions of many kinds
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        raise ValueError("no whole numbers")
    return found.astype(np.int64)
