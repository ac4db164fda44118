"""Read batches of views (crops of images), in worker processes or not, in a fixed order and with bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmem.data.decoding import DamagedImage, Skipped
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Views
from fastmem.data.workers import WorkersNotStarted, read_in_workers
from fastmem.errors import InputFileError, UsageError
from fastmem.runs.ranks import local_ranks

MAX_WORKERS = 4
# for fewer images than this, starting workers takes more time than they save
FEW_IMAGES = 256


@dataclass(frozen=True, eq=False)
class Batch:
    """The views of one batch of images, without the images that could not be read.

    Attributes:
        positions: int64 [n], positions in the manifest of the images that could be read.
        views: uint8 [n, V, S, S, 3] in [0, 255], the V crops of each of them.
        skipped: the batch's images that could not be read, in order.
    """

    positions: np.ndarray
    views: torch.Tensor
    skipped: list[Skipped]


def check_readable(source: ImageSource, asked: int, kept: int, first: Skipped | None = None) -> None:
    """Raise an error if images were to be read and none of them could be.

    Args:
        source: the images.
        asked: number of images that were to be read.
        kept: number of images that could be read.
        first: an image that could not be read, to name in the message.

    Raises:
        InputFileError: ``asked`` is above 0 and ``kept`` is 0.
    """
    if asked and not kept:
        named = "" if first is None else f", the first {first.name} ({first.reason})"
        raise InputFileError(
            f"expected images that can be read in {source.description}, got {asked} that cannot{named}: copy them again"
        )


def load_views(
    source: ImageSource,
    manifest: Manifest,
    batches: Iterable[np.ndarray | Sequence[int]] | Flow,
    recipe: Views,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Decode and crop the given batches of manifest positions, one `Batch` for each, in their order.

    The result is the same for any number of workers. Damaged images make a batch smaller, or even empty.

    Args:
        source: the images that the manifest was built from.
        manifest: the order of the images.
        batches: manifest positions, integers [n], for each batch.
        recipe: which crops to make.
        workers: number of worker processes; by default up to 4, as cores allow, and none for fewer
            than 256 images.

    Raises:
        UsageError: a position is out of range, the manifest is of another source, or ``workers`` is negative.
        FastmemError: worker processes cannot be started, or one died (raised while iterating).
    """
    return load(ViewReader(source, manifest, recipe), batches, workers)


@dataclass(frozen=True, eq=False)
class Flow:
    """Batches that are not all known from the start.

    Attributes:
        batches: manifest positions, int64 [n], for each batch, taken a little before they are read; None where there is
            none until the results of those before have been taken.
        largest: images of a batch, at most.
        images: images of all batches, about.
    """

    batches: Iterator[np.ndarray | None]
    largest: int
    images: int


def load(
    reader: ViewReader, batches: Iterable[np.ndarray | Sequence[int]] | Flow, workers: int | None = None
) -> Iterator[Any]:
    """Yield what ``reader.read`` returns for each of the given batches of manifest positions, in their order.

    A batch is integers [n]. ``workers`` is the number of worker processes; by default up to 4, as cores allow,
    and none for fewer than 256 images.

    Raises:
        UsageError: a position is out of range, the manifest is of another source, or ``workers`` is negative.
        FastmemError: worker processes cannot be started, or one died (raised while iterating).
    """
    if workers is not None and workers < 0:
        raise UsageError(f"expected 0 or more worker processes, got {workers}; leave it out to have them chosen")
    source, manifest = reader.source, reader.manifest
    if not isinstance(batches, Flow):
        checked = [_checked(batch, len(manifest)) for batch in batches]
        sizes = [len(batch) for batch in checked]
        batches = Flow(iter(checked), max(sizes, default=0), sum(sizes))
    index = manifest.index
    inside = index.min(initial=0) >= 0 and index.max(initial=0) < len(source)
    if not inside or not np.array_equal(source.ids[index], manifest.ids):
        raise UsageError(
            f"expected a manifest of {source.description}, got one of other images or loaded without them; "
            "build it from this source or load it with this source"
        )
    return _iterate(reader, batches, workers)


class ViewReader:
    """Reads whole batches, each by the manifest positions of its images, in the caller's process or in a worker.

    ``source`` holds the images, ``manifest``
    their order, and ``recipe`` says which crops to make.
    """

    def __init__(self, source: ImageSource, manifest: Manifest, recipe: Views) -> None:
        self.source = source
        self.manifest = manifest
        self.recipe = recipe

    def read(self, positions: np.ndarray) -> Any:
        """Return a worker's result for the images at manifest positions int64 [n]; here it is a `Batch` of views."""
        self.prepare(positions)
        return self.cut(positions)

    def prepare(self, positions: np.ndarray) -> None:
        """Tell the source which images are read next: those at manifest positions int64 [n]."""
        self.source.prepare(self.manifest.index[positions].tolist())

    def cut(self, positions: np.ndarray) -> Batch:
        """Return the views of the images at manifest positions int64 [n]; images that cannot be read are left out."""
        size = self.recipe.size
        views = torch.empty((len(positions), self.recipe.count, size, size, 3), dtype=torch.uint8)
        pixels = views.numpy()
        kept: list[int] = []
        skipped: list[Skipped] = []
        for position in positions.tolist():
            try:
                image = self.source.read(int(self.manifest.index[position]))
                pixels[len(kept)] = self.recipe(image, int(self.manifest.ids[position]))
            except DamagedImage as error:
                skipped.append(Skipped(str(self.manifest.names[position]), error.reason))
            else:
                kept.append(position)
        return Batch(np.array(kept, dtype=np.int64), views[: len(kept)], skipped)


def _iterate(reader: ViewReader, flow: Flow, asked: int | None) -> Iterator[Any]:
    workers = _default_workers(flow.images) if asked is None else asked
    if workers:
        batch_bytes = flow.largest * reader.recipe.count * reader.recipe.size**2 * 3
        try:
            yield from read_in_workers(reader.read, flow.batches, workers, batch_bytes)
            return
        except WorkersNotStarted:
            # the result is the same without workers that nobody asked for
            if asked is not None:
                raise
    yield from (reader.read(batch) for batch in flow.batches if batch is not None)


def _checked(batch: np.ndarray | Sequence[int], count: int) -> np.ndarray:
    positions = np.asarray(batch)
    if positions.shape == (0,):
        return positions.astype(np.int64)
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or positions.min() < 0 or positions.max() >= count:
        raise UsageError(
            f"expected every batch as positions [n] in a manifest of {count} images, got {positions.tolist()!s:.60}; "
            "cut it from the manifest's work units"
        )
    return positions.astype(np.int64)


def _default_workers(images: int) -> int:
    if images < FEW_IMAGES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(cores // local_ranks(), 1) - 1)
