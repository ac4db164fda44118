"""Images in parquet files, in the layout of Hugging Face's image data sets: the bytes of image files, and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from fastmem.data.class_order import Classes, in_label_order, numbered_classes
from fastmem.data.decoding import DamagedImage, Skipped
from fastmem.data.listing import MAX_ENTRY_BYTES
from fastmem.data.sharded import ShardedSource, shards_description
from fastmem.data.shards import Pattern, Shards, is_remote
from fastmem.errors import InputFileError, UsageError

NO_LABEL = "no label"
# names of columns, in files that do not say which one has images and which one labels
_IMAGES, _LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "class", "cls")
# a row group is read as a whole; images of a larger one do not fit into memory
MAX_GROUP_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Columns:
    """Where images and labels stand in a parquet file.

    Attributes:
        image: the column of images.
        content: the column of their bytes, which is part of it where an image has a path too.
        path: the column of their paths; None where there is none.
        label: the column of labels.
        names: class names by number; None for labels without names, or that are names.
    """

    image: str
    content: str
    path: str | None
    label: str
    names: tuple[str, ...] | None


class ParquetSource(ShardedSource):
    """Images in parquet files with a column of image files' bytes, alone or beside their paths, and one of labels.

    Class names are those that Hugging Face's metadata have for the labels. The name of an image is its path, without
    the folder of its class, or the file's name and the number of the row where no path is stored. A row group is read
    as a whole, so images are read fastest where row groups are small or rows are sorted by class.

    Args:
        pattern: paths, local or fsspec's, with ``{000..293}``, wildcards, or ``::`` between them; or a list of paths.
        classes: class names in label order, or a text file with one per line; by default the order of the labels. Where
            it has none of the stored names, it names the labels by position.

    Raises:
        InputFileError: a file or the text file of classes is missing or damaged.
        UsageError: the columns cannot be told, no image has a label, or ``classes`` does not fit.
    """

    def __init__(self, pattern: Pattern, classes: Classes | None = None) -> None:
        self.shards = Shards(pattern)
        description = shards_description("parquet", self.shards)
        self.columns = find_columns(self._file(0).schema_arrow, description)
        self._kept: tuple[tuple[int, int] | None, Any] = (None, None)
        paths: list[str] = []
        stored: list[int | str] = []
        shard, group, row, skipped = [], [], [], []
        for number in range(len(self.shards)):
            for at, (path, label, in_group, in_rows) in enumerate(self._listed(number)):
                if label is None or label == "" or (isinstance(label, int) and label < 0):
                    skipped.append(Skipped(path or _by_row(self.shards.paths[number], at), NO_LABEL))
                    continue
                paths.append(path or _by_row(self.shards.paths[number], at))
                stored.append(label)
                shard.append(number)
                group.append(in_group)
                row.append(in_rows)
        order: Classes | None = classes
        by_number: Sequence[str] = ()
        present = set(stored)
        numbers = sorted(label for label in present if isinstance(label, int))
        if numbers:
            by_number, order = numbered_classes(numbers, self.columns.names, classes, description)
        found: dict[str, list[str]] = {}
        places: dict[str, int] = {}
        for place, (path, label) in enumerate(zip(paths, stored, strict=True)):
            owner = by_number[label] if isinstance(label, int) else label
            name = path.removeprefix(f"{owner}/")
            found.setdefault(owner, []).append(name)
            places[f"{owner}/{name}"] = place
        names, labels, ordered = in_label_order(found, skipped, order, description, guess=False)
        at_place = np.array([places[name] for name in names], dtype=np.int64)
        self._shard, self._group = np.array(shard, np.int32)[at_place], np.array(group, np.int32)[at_place]
        self._row = np.array(row, np.int64)[at_place]
        super().__init__(pattern, names, labels, ordered, skipped, description)

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_kept": (None, None)}

    def _file(self, number: int) -> Any:
        """Return a shard as a parquet file."""
        from pyarrow import parquet

        path = self.shards.paths[number]
        opened = self.shards.file(number)
        try:
            # the library closes what it is given, and reads local files best by itself
            return parquet.ParquetFile(opened if is_remote(path) else path, page_checksum_verification=True)
        # a damaged file makes the library raise exceptions of many kinds
        except Exception as error:
            raise _damaged(path, error) from error

    def _listed(self, number: int) -> Iterator[tuple[str | None, int | str | None, int, int]]:
        """Yield path and label of every row of a shard, with the number of its row group, and its number in that."""
        file, columns, path = self._file(number), self.columns, self.shards.paths[number]
        if number and find_columns(file.schema_arrow, path) != columns:
            raise UsageError(
                f"expected the columns and class names of {self.shards.paths[0]} in every shard, got others in {path}; "
                "open them one by one"
            )
        wanted = [columns.label] if columns.path is None else [columns.label, columns.path]
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group, columns=wanted, use_threads=False)
                labels = table[columns.label].to_pylist()
                paths = [None] * len(labels)
                if columns.path is not None:
                    image = table[columns.image].combine_chunks()
                    paths = image.field(columns.path.rpartition(".")[2]).to_pylist()
            except Exception as error:
                raise _damaged(path, error) from error
            for row, (name, label) in enumerate(zip(paths, labels, strict=True)):
                yield _clean(name), label, group, row

    def _stored_at(self, index: int) -> tuple[int, int]:
        return int(self._shard[index]), (int(self._group[index]) << 32) + int(self._row[index])

    def _contents(self, indexes: Sequence[int]) -> Iterator[tuple[int, bytes | DamagedImage]]:
        for index in indexes:
            shard, row, name = int(self._shard[index]), int(self._row[index]), str(self.names[index])
            column = self._rows(shard, int(self._group[index]))
            if isinstance(column, str):
                yield index, DamagedImage(column, name)
                continue
            if row >= len(column):
                yield index, DamagedImage("not in the parquet file any more", name)
                continue
            content = column[row].as_py()
            if content is None:
                yield index, DamagedImage("no content is stored", name)
            elif len(content) > MAX_ENTRY_BYTES:
                yield index, DamagedImage(f"huge: {len(content)} bytes, the limit is {MAX_ENTRY_BYTES}", name)
            else:
                yield index, content

    def _rows(self, shard: int, group: int) -> Any:
        """Return the bytes of all images of a row group, or what is wrong with it; the last one is kept."""
        if self._kept[0] != (shard, group):
            # never two of them at once
            self._kept = None, None
            self._kept = (shard, group), self._read_group(shard, group)
        return self._kept[1]

    def _read_group(self, shard: int, group: int) -> Any:
        file, columns = self._file(shard), self.columns
        if group >= file.num_row_groups:
            return "not in the parquet file any more"
        try:
            found = file.metadata.row_group(group)
            size = max(found.column(i).total_uncompressed_size for i in range(found.num_columns))
            if size > MAX_GROUP_BYTES:
                return f"in a huge row group: {size} bytes, the limit is {MAX_GROUP_BYTES}; write smaller ones"
            column = file.read_row_group(group, columns=[columns.content], use_threads=False)[columns.image]
            if columns.content == columns.image:
                return column
            return column.combine_chunks().field(columns.content.rpartition(".")[2])
        except Exception as error:
            return f"damaged in the parquet file: {_first_line(error)}"


def find_columns(schema: Any, where: str) -> Columns:
    """Return which columns of a parquet file have images and labels; ``schema`` is pyarrow's, ``where`` names the file.

    Raises:
        UsageError: no column has images or labels, or several may.
    """
    features = _features(schema)
    images = [name for name in schema.names if _is_image(schema.field(name).type)]
    labels = [name for name in schema.names if _is_label(schema.field(name).type)]
    said = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    image = _chosen(said or images, _IMAGES, "images (bytes of image files)", where, schema)
    said = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
    label = _chosen(
        said or [name for name in labels if name in _LABELS], _LABELS, f"labels ({', '.join(_LABELS)})", where, schema
    )
    names = features.get(label, {}).get("names")
    known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    kind = schema.field(image).type
    inner = {kind.field(i).name for i in range(kind.num_fields)}
    return Columns(
        image,
        f"{image}.bytes" if inner else image,
        f"{image}.path" if "path" in inner else None,
        label,
        tuple(names) if known and isinstance(names, list) else None,
    )


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's metadata say of the columns, by name; nothing where there are none."""
    try:
        document = json.loads((schema.metadata or {})[b"huggingface"])
        features = document["info"]["features"]
    # a document that is nested too deep ends in a RecursionError
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: said for name, said in features.items() if isinstance(said, dict)}


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    if types.is_struct(kind):
        inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        path = inner.get("path")
        fits = path is None or types.is_string(path) or types.is_large_string(path) or types.is_null(path)
        return "bytes" in inner and is_bytes(inner["bytes"]) and fits
    return is_bytes(kind)


def _is_label(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def _chosen(found: Sequence[str], usual: Sequence[str], what: str, where: str, schema: Any) -> str:
    """Return the one column of those found, or of several the first that has a usual name."""
    if len(found) == 1:
        return found[0]
    named = [name for name in usual if name in found]
    if named:
        return named[0]
    raise UsageError(
        f"expected one column of {what} in {where}, got {len(found)} among {', '.join(schema.names)[:200]}; rename the "
        f"column to {usual[0]}"
    )


def _clean(path: str | None) -> str | None:
    """Return the path of an image as part of its name; None where it names none."""
    if not path:
        return None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    # a path of the machine on which the file was written says nothing of the data set
    if not parts or path.startswith("/") or ".." in parts or ":" in parts[0]:
        return parts[-1] if parts and parts[-1] != ".." else None
    return "/".join(parts)


def _by_row(shard: str, row: int) -> str:
    return f"{PurePosixPath(shard).stem}/{row:08d}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__


def _damaged(path: str, error: Exception) -> InputFileError:
    return InputFileError(
        f"expected a whole parquet file at {path}, got one that cannot be read ({_first_line(error)}); copy it again"
    )
