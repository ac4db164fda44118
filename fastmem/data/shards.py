"""The files in which a data set is stored in many pieces (shards): local ones, and remote ones through fsspec.

A pattern names them: `train-{000000..000146}.tar`, `data/train-*.parquet`, several paths with `::` between them, or a
list of paths. A path that begins with `file://`, `s3://`, `https://` or another protocol is fsspec's.
"""

from __future__ import annotations

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from fastmem.data.listing import SPLIT_NAMES, regular
from fastmem.data.system_files import is_system_name
from fastmem.data.tar_listing import BLOCK, is_tar
from fastmem.errors import InputFileError, UsageError

# paths, or one text that names them
Pattern = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

MAX_SHARDS = 1_000_000
# what shards are, by the endings of their names
TAR, PARQUET, TOKENS = "tar", "parquet", "tokens"
_ENDINGS = {".tar": TAR, ".parquet": PARQUET, ".jsonl": TOKENS}
_PARQUET_START = b"PAR1"
# between the paths of a list that is written as one text, as in webdataset
BETWEEN = "::"
# files that are kept open at once
_OPEN_FILES = 64
# the most that is asked of the system at once
_READ_BYTES = 2**30
# two letters, because one letter is a drive
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_remote(path: str) -> bool:
    """Return whether a path is one of fsspec's, with a protocol."""
    return _PROTOCOL.match(path) is not None


def is_pattern(path: str) -> bool:
    """Return whether a text names several files, or remote ones."""
    return is_remote(path) or BETWEEN in path or glob.has_magic(path) or any(_alternatives(b) for b in _braces(path))


def is_shard(path: Path) -> bool:
    """Return whether a local file is a shard, or has the name of one."""
    if path.suffix.lower() in _ENDINGS or any(f".tar.{end}" in path.name.lower() for end in ("gz", "zst", "xz", "bz2")):
        return True
    try:
        with open(path, "rb", opener=regular) as file:
            start = file.read(BLOCK)
    except OSError:
        return False
    return is_tar(start) or start.startswith(_PARQUET_START)


def shards_in(folder: Path, split: str | None) -> list[str]:
    """Return the shards that lie in a folder, or in its folder ``data``, sorted; none in a folder of other folders.

    Of shards that are named by splits (``train-00000-of-00294.parquet``) those of ``split`` are returned, which is
    ``train`` by default; ``""`` stands for all.

    Raises:
        UsageError: no shard is of the split, or there are both tar and parquet files.
    """
    place, names = folder, _shard_names(folder)
    if names is None:
        return []
    if not names:
        place = folder / "data"
        names = _shard_names(place) or []
    if not names:
        return []
    kinds = sorted({os.path.splitext(name)[1].lower()[1:] for name in names}, reverse=True)
    if len(kinds) > 1:
        raise UsageError(
            f"expected shards of one kind in {place}, got both {' and '.join(kinds)} files; name those to read"
        )
    wanted = "train" if split is None else split
    of_split = [name for name in names if re.split(r"[-._]", name, maxsplit=1)[0] == wanted] if wanted else names
    # shards with the split in the middle of their names: imagenet1k-train-0000.tar
    of_split = of_split or [name for name in names if wanted in re.split(r"[-._]", name)]
    if not of_split:
        splits = {word for name in names for word in re.split(r"[-._]", name)} & SPLIT_NAMES
        if split or splits:
            raise UsageError(
                f"expected shards of the split {wanted!r} in {place}, got {names[0]} and {len(names) - 1} others; name "
                'another split, "" for all, or the shards themselves'
            )
        of_split = names
    return [os.path.join(place, name) for name in of_split]


def _shard_names(folder: Path) -> list[str] | None:
    """Return the sorted names of the shards in a folder; None where it has folders of another name than ``data``."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system_name(entry.name):
                    continue
                if entry.is_dir():
                    if entry.name != "data":
                        return None
                elif os.path.splitext(entry.name)[1].lower() in _ENDINGS:
                    names.append(entry.name)
    except OSError:
        # what is wrong with the folder is said where its images are listed
        return None
    return sorted(names)


def expand(pattern: Pattern) -> list[str]:
    """Return the paths that a pattern names, in its order, and those of a wildcard sorted; local ones are absolute.

    Raises:
        InputFileError: a wildcard fits no file, or a file system cannot be asked.
        UsageError: the pattern names no path, a path twice, or more than a million of them.
    """
    found: list[str] = []
    for text in _texts(pattern):
        for path in _spelled_out(text):
            found += _matches(path)
            if len(found) > MAX_SHARDS:
                raise UsageError(f"expected at most {MAX_SHARDS:,} shards, got more from {text}; check the pattern")
    if not found:
        raise UsageError(f"expected a pattern of shards, got {pattern!r}; give paths such as train-*.tar")
    if len(set(found)) < len(found):
        twice = next(path for place, path in enumerate(found) if path in found[:place])
        raise UsageError(f"expected every shard once, got {twice} twice; check the pattern")
    return found


def place_of(pattern: Pattern) -> str:
    """Return a text that names the same shards from any working folder."""
    return BETWEEN.join(path if is_remote(path) else os.path.abspath(path) for path in _texts(pattern))


def _texts(pattern: Pattern) -> list[str]:
    if not isinstance(pattern, (str, os.PathLike)):
        return [os.fspath(path) for path in pattern]
    text = os.fspath(pattern)
    # fsspec chains file systems by the same sign
    return [text] if os.path.exists(text) else [part for part in text.split(BETWEEN) if part]


def _braces(text: str) -> list[str]:
    return _BRACES.findall(text)


def _alternatives(inside: str) -> Sequence[str]:
    """Return what stands in braces one by one; nothing where it is neither a range nor a list."""
    ends = _RANGE.fullmatch(inside)
    if ends is None:
        return inside.split(",") if "," in inside else []
    first, last = int(ends[1]), int(ends[2])
    if abs(last - first) >= MAX_SHARDS:
        raise UsageError(f"expected at most {MAX_SHARDS:,} shards, got the range {inside}; check the pattern")
    # as shells do it: a zero in front asks for equal width
    padded = any(len(end) > 1 and end.startswith("0") for end in ends.groups())
    width = max(map(len, ends.groups())) if padded else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def _spelled_out(text: str) -> Iterator[str]:
    """Yield a text once for every choice in its braces; braces in the name of a file that exists are part of it."""
    if not os.path.exists(text):
        for found in _BRACES.finditer(text):
            chosen = _alternatives(found[1])
            if chosen:
                for choice in chosen:
                    yield from _spelled_out(text[: found.start()] + choice + text[found.end() :])
                return
    yield text


def _matches(path: str) -> list[str]:
    if is_remote(path):
        # a question mark is part of many addresses
        if not any(sign in path for sign in "*["):
            return [path]
        system, inside = _file_system(path)
        try:
            found = sorted(system.unstrip_protocol(name) for name in system.glob(inside))
        # file systems raise exceptions of many kinds
        except Exception as error:
            raise _cannot(path, error) from error
    else:
        if os.path.lexists(path) or not glob.has_magic(path):
            return [os.path.abspath(path)]
        found = sorted(map(os.path.abspath, glob.glob(path, recursive=True)))
    if not found:
        raise InputFileError(f"expected shards that match {path}, got none; check the path")
    return found


def _file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system for a path, which is another one in every process, and the path in it."""
    import fsspec

    try:
        system, inside = fsspec.core.url_to_fs(path)
    # protocols that need another package, and options of them that are wrong
    except Exception as error:
        raise UsageError(f"expected a file system that can be opened for {path}, got: {error}") from error
    return system, inside


def _cannot(path: str, error: Exception) -> InputFileError:
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    got = "nothing there" if missing else getattr(error, "strerror", None) or str(error) or type(error).__name__
    return InputFileError(f"expected a shard that can be read at {path}, got {got}; check the path")


class Shards:
    """Files that are read at any place; every process opens them itself, and a copy that is pickled has none open.

    Attributes:
        paths: the files; they are named by their positions here.
        sizes: bytes of each when it was opened first.
    """

    def __init__(self, pattern: Pattern) -> None:
        """Find the files.

        Raises:
            InputFileError, UsageError: as `expand`.
        """
        self.paths = expand(pattern)
        self.sizes: dict[int, int] = {}
        self._open: OrderedDict[int, tuple[BinaryIO, Any, str]] = OrderedDict()
        self._process = os.getpid()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths, self.sizes = state["paths"], state["sizes"]
        self._open, self._process, self._lock = OrderedDict(), os.getpid(), Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def close(self) -> None:
        """Close all files; they are opened again when they are read."""
        while self._open:
            self._open.popitem()[1][0].close()

    def file(self, number: int) -> BinaryIO:
        """Return a shard as an open file, at any position.

        Raises:
            InputFileError: it is missing, cannot be opened, or is not as large as when it was opened first.
            UsageError: the file system of a remote one is not there.
        """
        return self._opened(number)[0]

    def kind(self, number: int) -> str:
        """Return what a shard is by its content and its name, and ``TAR`` for anything else. Raises: as ``read``."""
        try:
            start = self.read(number, 0, len(_PARQUET_START))
        except OSError as error:
            raise _cannot(self.paths[number], error) from error
        ending = os.path.splitext(self.paths[number])[1].lower()
        return PARQUET if start == _PARQUET_START else _ENDINGS.get(ending, TAR)

    def size(self, number: int) -> int:
        """Return the bytes of a shard. Raises: as ``file``."""
        if number not in self.sizes:
            self.file(number)
        return self.sizes[number]

    def read(self, number: int, start: int, size: int) -> bytes:
        """Return bytes of a shard from a position on; fewer at its end.

        Raises:
            InputFileError: as ``file``, or a remote file cannot be read.
            OSError: a local file cannot be read there.
        """
        file, system, inside = self._opened(number)
        size = max(0, min(size, self.sizes[number] - start))
        if system is not None:
            try:
                return bytes(system.cat_file(inside, start=start, end=start + size)) if size else b""
            # file systems raise exceptions of many kinds
            except Exception as error:
                raise _cannot(self.paths[number], error) from error
        parts = []
        # the system may return less than was asked for
        while size and (part := os.pread(file.fileno(), min(size, _READ_BYTES), start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)

    def _opened(self, number: int) -> tuple[BinaryIO, Any, str]:
        """Return a shard as an open file, its file system (None for a local one), and its path there."""
        with self._lock:
            if self._process != os.getpid():
                # a forked process shares the positions of open files
                self._open, self._process = OrderedDict(), os.getpid()
            if number not in self._open:
                self._open[number] = self._open_now(number)
                while len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1][0].close()
            self._open.move_to_end(number)
            return self._open[number]

    def _open_now(self, number: int) -> tuple[BinaryIO, Any, str]:
        path = self.paths[number]
        system, inside = _file_system(path) if is_remote(path) else (None, path)
        try:
            file = (
                open(path, "rb", buffering=0, opener=regular)  # noqa: SIM115 - it stays open
                if system is None
                else system.open(inside, "rb", cache_type="readahead")
            )
            size = file.seek(0, os.SEEK_END)
        # file systems raise exceptions of many kinds
        except Exception as error:
            raise _cannot(path, error) from error
        if self.sizes.setdefault(number, size) != size:
            file.close()
            raise InputFileError(
                f"expected {path} as it was listed, with {self.sizes[number]} bytes, got {size}; bring the old file "
                "back or begin again"
            )
        return file, system, inside
