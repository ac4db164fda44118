"""The manifest of a run: which images take part, in which order, and in which of four folds."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from fastmem.data.sources import ImageSource
from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_table, write_table

# disjoint parts of equal size, from which intervals and the reliability of rankings are computed
FOLDS = 4
_SCHEMA = "fastmem-manifest-1"
_COLUMNS = {"id": "int64", "label": "int64", "name": "string", "fold": "int8"}
# stands for the position of an image in a source that was not given
_WITHOUT_SOURCE = -1


@dataclass(frozen=True)
class WorkUnit:
    """A slice of a manifest, from position ``start`` up to but without ``stop``, with images of one label only."""

    label: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """The list of the images of a run, sorted by label and id, with a fold for each.

    Attributes:
        ids: int64 [N], image ids.
        labels: int64 [N], ascending, positions in ``classes``.
        index: int64 [N], position of each image in its source; -1 when loaded without a source.
        fold: int8 [N] in 0..3; in every class the folds have equal numbers of images, to within one.
        names: strings [N], ``class/name``.
        classes: class names in label order.
    """

    ids: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    fold: np.ndarray
    names: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def build(cls, source: ImageSource, per_class: int | None = None, seed: int = 0) -> Manifest:
        """Sort the images of a source by label and id, and assign each to one of four folds.

        ``per_class`` keeps at most that many images of each class. Folds and kept images are chosen by a hash of
        ``seed`` and image id, so whether an image is kept depends on its own class alone. The hash is SplitMix64, which
        numpy computes for a million ids at once.

        Raises:
            UsageError: ``per_class`` is below 1.
        """
        if per_class is not None and per_class < 1:
            raise UsageError(f"expected at least 1 image per class, got {per_class}; raise it or leave it out")
        order = np.lexsort((_shuffled(source.ids, seed), source.labels))
        if per_class is not None:
            labels = source.labels[order]
            order = order[np.arange(len(order)) - np.searchsorted(labels, labels) < per_class]
        # counting on from class to class makes the folds equal to within one image, in every class and as a whole
        fold = (np.arange(len(order)) % FOLDS).astype(np.int8)
        by_id = np.lexsort((source.ids[order], source.labels[order]))
        index = order[by_id]
        return cls(
            ids=source.ids[index],
            labels=source.labels[index],
            index=index,
            fold=fold[by_id],
            names=source.names[index],
            classes=source.classes,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the ids, labels and folds, in hexadecimal."""
        digest = hashlib.sha256(_SCHEMA.encode())
        for array in (self.ids.astype("<i8"), self.labels.astype("<i8"), self.fold.astype("<i1")):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def match(self, heldout: Manifest, seed: int = 0) -> tuple[np.ndarray, Manifest]:
        """Choose images of this and a held-out manifest so that both sets have equally many of each class and fold.

        Both sides keep as many images of a class as the smaller side has, chosen by a hash of ``seed`` and image id.
        Both manifests must have been built with this ``seed``. Each held-out image is paired with an image of this
        manifest and gets its fold. Return a mask, bool [N], of the images chosen from this manifest, and a manifest of
        the held-out images chosen.

        Raises:
            UsageError: the two manifests have no class in common.
        """
        mask = np.zeros(len(self), dtype=bool)
        kept, folds = [], []
        for label in np.intersect1d(self.labels, heldout.labels):
            mine, theirs = (_drawing_order(m, int(label), seed) for m in (self, heldout))
            size = min(len(mine), len(theirs))
            mask[mine[:size]] = True
            kept.append(theirs[:size])
            folds.append(self.fold[mine[:size]])
        if not kept:
            raise UsageError(
                "expected a held-out set with classes of the training set, got none in common: give both the same "
                "class order (--classes FILE)"
            )
        positions, fold = np.concatenate(kept), np.concatenate(folds)
        order = np.lexsort((heldout.ids[positions], heldout.labels[positions]))
        at = positions[order]
        arrays = (heldout.ids[at], heldout.labels[at], heldout.index[at], fold[order], heldout.names[at])
        return mask, Manifest(*arrays, heldout.classes)

    def work_units(self, max_images: int | None = None) -> list[WorkUnit]:
        """Split the manifest into slices of one class each, with at most ``max_images`` images (None for no limit).

        Raises:
            UsageError: ``max_images`` is below 1.
        """
        if max_images is not None and max_images < 1:
            raise UsageError(f"expected at least 1 image in a work unit, got {max_images}; raise it or leave it out")
        edges = [0, *(np.flatnonzero(np.diff(self.labels)) + 1).tolist(), len(self)]
        return [
            WorkUnit(int(self.labels[start]), start, min(start + (max_images or len(self)), stop))
            for first, stop in zip(edges, edges[1:], strict=False)
            for start in range(first, stop, max_images or len(self))
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a parquet file with the columns id, class, label, name and fold, completely or not at all.

        Raises:
            UsageError: the folder cannot be written.
        """
        import pyarrow

        columns = {
            "id": pyarrow.array(self.ids),
            "class": pyarrow.DictionaryArray.from_arrays(self.labels.astype(np.int32), pyarrow.array(self.classes)),
            "label": pyarrow.array(self.labels),
            "name": pyarrow.array(self.names.tolist(), pyarrow.string()),
            "fold": pyarrow.array(self.fold),
        }
        metadata = {"schema": _SCHEMA, "hash": self.hash, "classes": json.dumps(self.classes), "words": self._words()}
        write_table(Path(path), columns, {f"fastmem.{key}": value for key, value in metadata.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], source: ImageSource | None = None) -> Manifest:
        """Read a manifest from a parquet file, and look up the positions of its images in ``source`` if that is given.

        Raises:
            InputFileError: the file is missing, damaged, or not a manifest.
            UsageError: the source lacks an image of the manifest, or has it under another label.
        """
        path = Path(path)
        table = read_table(
            path, f"a manifest ({_SCHEMA})", {"id": "int64", "label": "int64", "name": "string", "fold": "int8"}
        )
        metadata = table.schema.metadata or {}
        try:
            found = {key: metadata[f"fastmem.{key}".encode()].decode() for key in ("schema", "hash", "classes")}
            manifest = cls(
                ids=table["id"].to_numpy(),
                labels=table["label"].to_numpy(),
                index=np.full(len(table), _WITHOUT_SOURCE),
                fold=table["fold"].to_numpy(),
                names=np.array(table["name"].to_pylist(), dtype=np.dtypes.StringDType()),
                classes=msgspec.json.decode(found["classes"], type=tuple[str, ...]),
            )
            manifest._check(found, metadata.get(b"fastmem.words"))
        except (KeyError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise InputFileError(
                f"expected a manifest ({_SCHEMA}) in {path}, got one that cannot be used ({error}): make it again"
            ) from error
        return manifest if source is None else manifest.found_in(source)

    def _words(self) -> str:
        """CRC-32 of all names and classes, which the hash leaves out, in hexadecimal."""
        return f"{zlib.crc32(json.dumps([self.classes, self.names.tolist()]).encode()):08x}"

    def _check(self, saved: Mapping[str, str], words: bytes | None) -> None:
        """Check what was read against what was saved. Raises: ValueError where it does not fit."""
        if (saved["schema"], saved["hash"]) != (_SCHEMA, self.hash):
            raise ValueError(f"schema {saved['schema']}, hash {saved['hash']}, contents {self.hash}")
        # manifests of earlier versions have no check sum of their names
        if words is not None and words.decode() != self._words():
            raise ValueError("other names or classes than were saved")
        if not len(self) or np.diff(self.labels).min(initial=0) < 0 or len(np.unique(self.ids)) < len(self):
            raise ValueError("no images, labels that do not ascend, or an id twice")
        for what, values, below in (("label", self.labels, len(self.classes)), ("fold", self.fold, FOLDS)):
            if values.min() < 0 or values.max() >= below:
                raise ValueError(f"{what}s from {values.min()} to {values.max()} in place of 0 to {below - 1}")

    def found_in(self, source: ImageSource) -> Manifest:
        """Return this manifest with the positions of its images in ``source``.

        Raises:
            UsageError: the source lacks an image of the manifest, or has it under another label.
        """
        index = source.index_of(self.ids)
        moved = np.flatnonzero(source.labels[index] != self.labels)
        if len(moved):
            first = moved[0]
            raise UsageError(
                f"expected label {self.labels[first]} for {self.names[first]} as in the manifest, got "
                f"{source.labels[index[first]]} in {source.description}; use the same class order"
            )
        return Manifest(self.ids, self.labels, index, self.fold, self.names, self.classes)


def _drawing_order(manifest: Manifest, label: int, seed: int) -> np.ndarray:
    """Return the positions of a class's images in the order in which they are chosen and assigned to folds."""
    start, stop = np.searchsorted(manifest.labels, [label, label + 1])
    return start + np.argsort(_shuffled(manifest.ids[start:stop], seed))


def _shuffled(ids: np.ndarray, seed: int) -> np.ndarray:
    """Return sort keys, uint64 [N], for ids int64 [N]; different ids get different keys.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (the output function SplitMix64).
    """
    start = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return _splitmix64(ids.astype(np.uint64) ^ start)


def _splitmix64(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
