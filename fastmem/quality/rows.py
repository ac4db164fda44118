"""Rows of feature vectors, in memory or in files: what is in files is read a block at a time, and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastmem.errors import InputFileError
from fastmem.files import check_tensors, read_tensors, write_atomically

# rows that are read at once where all are wanted, one block after the other
BLOCK = 2048
LITTLE = np.dtype("<f4")


class Rows(Protocol):
    """Vectors, float32 [N,D], of which some are read at a time; an array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N and D."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: Any, /) -> Any:
        """Return the rows in a slice, or at positions, int64 [n], as float32 [n,D]."""


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The rows of one tensor of several feature files, below one another; they are read when they are asked for.

    Attributes:
        files: the files.
        starts: position in bytes of each file's first row.
        ends: int64 [files], number of rows up to the end of each file.
        dimensions: length of a row.
    """

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    ends: np.ndarray
    dimensions: int

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), self.dimensions

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        """Return the rows in a slice, or at positions, int64 [n], as float32 [n,D].

        Raises: InputFileError where a file is gone or was cut, or holds numbers that are not finite.
        """
        positions = np.arange(*at.indices(len(self))) if isinstance(at, slice) else np.asarray(at)
        order = np.argsort(positions, kind="stable")
        found = np.empty((len(positions), self.dimensions), np.float32)
        file_of = np.searchsorted(self.ends, positions[order], side="right")
        for number in np.unique(file_of):
            places = order[file_of == number]
            first = self.ends[number - 1] if number else 0
            found[places] = self._read(int(number), positions[places] - first)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def _read(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return rows of one file, by their ascending positions in it."""
        path = self.files[number]
        found = np.empty((len(rows), self.dimensions), LITTLE)
        runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
        try:
            with open(path, "rb", buffering=0) as file:
                for run in runs:
                    file.seek(self.starts[number] + int(rows[run[0]]) * self.dimensions * LITTLE.itemsize)
                    whole = found[run[0] : run[-1] + 1].data.cast("B")
                    done = 0
                    while done < len(whole):
                        got = file.readinto(whole[done:])
                        if not got:
                            raise OSError("the file ends early")
                        done += got
        except OSError as error:
            raise InputFileError(f"expected features in {path}, got {error}: make the file again") from error
        check_finite(found, str(path))
        return found


def check_finite(vectors: np.ndarray, place: str) -> None:
    """Check that numbers are finite; ``place`` says in the message where they come from.

    Raises: InputFileError where one is not.
    """
    if vectors.size and not (np.isfinite(vectors.min()) and np.isfinite(vectors.max())):
        raise InputFileError(
            f"expected features that are finite numbers, got NaN or infinity from {place}: check the weights of the "
            "network, and remove the file of features where there is one"
        )


def stored_rows(paths: Sequence[Path], schema: str, name: str) -> tuple[StoredRows | None, list[dict[str, Any]]]:
    """Return the rows of the tensor ``name`` of feature files, or None where a file lacks it, and the files' headers.

    ``schema`` is name and version of the files' format.

    Raises: InputFileError where a file is missing or damaged, has another schema, or the tensor has another type.
    """
    starts, ends, headers, width = [], [], [], None
    for path in paths:
        # the tensors are mapped and not read
        tensors, header = read_tensors(path, schema)
        headers.append(header)
        if name not in tensors:
            continue
        wide = "D" if width is None else width
        sizes = check_tensors(path, {name: tensors[name]}, {name: ("float32", ("N", wide))})
        width = tensors[name].shape[1]
        if not width:
            raise InputFileError(f"expected features of at least 1 dimension in {path}, got none: make the file again")
        ends.append(sizes["N"])
        starts.append(_start(path, name))
    if len(ends) < len(paths) or not ends or width is None:
        return None, headers
    return StoredRows(tuple(paths), tuple(starts), np.cumsum(ends), width), headers


def _start(path: Path, name: str) -> int:
    """Return the position in bytes of a tensor's data in a safetensors file that has been checked."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + int(json.loads(file.read(length))[name]["data_offsets"][0])


def write_rows(
    path: Path, schema: str, header: Mapping[str, Any], rows: Rows, more: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write rows to a safetensors file as its tensor "vectors", a block at a time, completely or not at all.

    Args:
        path: the file.
        schema: name and version of the file's format.
        header: more values for the file's metadata, which JSON can hold.
        rows: the rows.
        more: other tensors, float64, by name.

    Raises: UsageError where the file cannot be written.
    """
    entries: dict[str, Any] = {"__metadata__": {"fastmem": json.dumps({"schema": schema, **header})}}
    offset = 0
    shapes = {"vectors": ("F32", rows.shape, 4)} | {name: ("F64", a.shape, 8) for name, a in (more or {}).items()}
    for name, (dtype, shape, width) in shapes.items():
        end = offset + width * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)

    def content() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for start in range(0, len(rows), BLOCK):
            yield rows[start : start + BLOCK].astype(LITTLE).tobytes()
        for values in (more or {}).values():
            yield values.astype("<f8").tobytes()

    write_atomically(path, lambda partial: _write(partial, content()))


def _write(path: Path, content: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        file.writelines(content)


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Some of the rows of a larger set, by their positions, int64 [n]."""

    rows: Rows
    positions: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        """Return the rows in a slice, or at positions, of the chosen ones."""
        return np.asarray(self.rows[self.positions[at]])


def blocks(rows: Rows, size: int = BLOCK) -> Iterator[np.ndarray]:
    """Yield all rows in order, float32 [n,D], at most ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
