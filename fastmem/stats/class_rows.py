"""Class rows: what is kept of the images of every class, in memory or in one file for each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import torch

from fastmem.errors import InputFileError
from fastmem.files import check_finite, check_tensors, read_tensors, write_tensors
from fastmem.stats.accumulators import ROW_TENSORS, ClassRow

ROW_SCHEMA = "fastmem.class-row/2"


class RowShape(TypedDict):
    """The header of a class's file; ``counts`` has the number of images of every fold."""

    label: int
    counts: list[Annotated[int, msgspec.Meta(ge=0, le=2**53)]]


@dataclass(frozen=True)
class ClassRows:
    """The rows of all classes of one set of images, each read when it is needed.

    Iterating gives the rows in the order of their labels.

    Attributes:
        counts: number of images of each class, by its label.
        read: gives the row of the class with a label.
        folder: where the rows lie as files; None for rows that do not lie in one folder.
    """

    counts: Mapping[int, int]
    read: Callable[[int], ClassRow]
    folder: Path | None = None

    @classmethod
    def of_files(
        cls, counts: Mapping[int, int], folder: Path, fold: int, owner: Mapping[str, Any] | None = None
    ) -> ClassRows:
        """The rows of one fold that ``write_rows`` wrote into ``folder``.

        Args:
            counts: number of the fold's images of each class, by its label.
            folder: where the files lie.
            fold: the fold's number, from 0.
            owner: entries that the files must have, as `owner_of` gives them.
        """
        return cls(counts, partial(read_row, folder, fold, owner=owner or {}), folder)

    def __iter__(self) -> Iterator[ClassRow]:
        return (self.read(label) for label in sorted(self.counts))

    def merge(self, other: ClassRows) -> ClassRows:
        """The rows of two sets of images together; a class of both is merged whenever it is read."""
        sides = (self, other)

        def read(label: int) -> ClassRow:
            return reduce(ClassRow.merge, [side.read(label) for side in sides if label in side.counts])

        return ClassRows(Counter(self.counts) + Counter(other.counts), read)


def row_folder(path: Path) -> Path:
    """Where the class rows of the statistics file ``path`` lie: the folder NAME.classes beside it."""
    return path.with_name(path.stem + ".classes").absolute()


def owner_of(origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entries of an origin that class rows carry: the run and the set that they are of."""
    return {key: value for key, value in (origin or {}).items() if key in ("run", "set")}


def write_rows(folder: Path, label: int, rows: Sequence[ClassRow], owner: Mapping[str, Any] | None = None) -> None:
    """Write the rows of one class as ``class-LABEL.safetensors``.

    Args:
        folder: where the file goes; made where it is missing.
        label: the class.
        rows: the row of each fold, in order; one without images for a fold that lacks the class.
        owner: entries that say what the rows are of, as `owner_of` gives them.

    Raises: UsageError where the file cannot be written.
    """
    parts = [row.to_tensors() for row in rows]
    tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    header = {**(owner or {}), "label": label, "counts": [row.moments.count for row in rows]}
    write_tensors(_row_file(folder, label), tensors, ROW_SCHEMA, header)


def read_row(folder: Path, fold: int, label: int, owner: Mapping[str, Any] | None = None) -> ClassRow:
    """Read the row of one class in one fold from a file that ``write_rows`` wrote.

    Args:
        folder: where the file lies.
        fold: the fold's number, from 0.
        label: the class.
        owner: entries that the file must have, as `owner_of` gives them.

    Raises: InputFileError for a missing, damaged or foreign file, or one of another run.
    """
    path = _row_file(folder, label)
    tensors, header = read_tensors(path, ROW_SCHEMA, RowShape, owner)
    if header["label"] != label or not fold < len(header["counts"]):
        raise InputFileError(
            f"expected the row of class {label}, fold {fold} in {path}, got class {header['label']} with "
            f"{len(header['counts'])} folds: were the files renamed?"
        )
    shape = (len(header["counts"]), "layers", "segments", "units")
    check_tensors(path, tensors, {name: (dtype, shape) for name, dtype in ROW_TENSORS.items()})
    check_finite(path, tensors)
    return ClassRow.from_tensors({name: tensor[fold] for name, tensor in tensors.items()}, header["counts"][fold])


def _row_file(folder: Path, label: int) -> Path:
    return folder / f"class-{label:05d}.safetensors"
