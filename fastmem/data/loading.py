"""Reading batches of views in worker processes, in order and bounded in memory."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastmem.data.decoding import DamagedImage, Skipped
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Views
from fastmem.errors import FastmemError, InputFileError, UsageError

MAX_WORKERS = 4
PREFETCH = 2
# below this, starting workers costs more than they save
FEW_IMAGES = 256


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of images that could be read.

    Attributes:
        positions: int64 [n], positions in the manifest.
        views: uint8 [n, V, S, S, 3] in [0, 255].
        skipped: the batch's images that could not be read, in order.
    """

    positions: np.ndarray
    views: torch.Tensor
    skipped: list[Skipped]


def check_readable(source: ImageSource, asked: int, kept: int, first: Skipped | None = None) -> None:
    """Refuse a set of images of which not one could be read.

    Args:
        source: the images.
        asked: how many were to be read.
        kept: how many of them could be.
        first: one that could not be, to be named in the message.

    Raises:
        InputFileError: images were asked for and none was kept.
    """
    if asked and not kept:
        named = "" if first is None else f", the first {first.name} ({first.reason})"
        raise InputFileError(
            f"expected images that can be read in {source.description}, got {asked} that cannot{named}: copy them again"
        )


def load_views(
    source: ImageSource,
    manifest: Manifest,
    batches: Iterable[np.ndarray | Sequence[int]],
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
        workers: processes; by default up to 4, as cores and shared memory allow, and none for fewer than 256 images.

    Raises:
        UsageError: a position is out of range, the manifest is of another source, or ``workers`` is negative.
        FastmemError: a worker process died (raised while iterating).
    """
    return load(ViewReader(source, manifest, recipe), batches, workers)


def load(reader: ViewReader, batches: Iterable[np.ndarray | Sequence[int]], workers: int | None = None) -> Iterator:
    """What ``reader.read`` gives for the given batches of manifest positions, in their order.

    Raises: as ``load_views``.
    """
    if workers is not None and workers < 0:
        raise UsageError(f"expected 0 or more worker processes, got {workers}; leave it out to have them chosen")
    source, manifest = reader.source, reader.manifest
    batches = [_checked(batch, len(manifest)) for batch in batches]
    index = manifest.index
    inside = index.min(initial=0) >= 0 and index.max(initial=0) < len(source)
    if not inside or not np.array_equal(source.ids[index], manifest.ids):
        raise UsageError(
            f"expected a manifest of {source.description}, got one of other images or loaded without them; "
            "build it from this source or load it with this source"
        )
    if workers is None:
        workers = _default_workers(batches, reader.recipe)
    return _iterate(reader, batches, workers)


class ViewReader(Dataset[Any]):
    """Batches by their manifest positions; whole batches, so that a worker hands over one block of memory."""

    def __init__(self, source: ImageSource, manifest: Manifest, recipe: Views) -> None:
        self.source = source
        self.manifest = manifest
        self.recipe = recipe

    def __getitem__(self, positions: np.ndarray) -> Any:
        # torch rewrites an exception that crosses processes, so this family crosses as a value
        try:
            return self.read(positions)
        except FastmemError as error:
            return error

    def read(self, positions: np.ndarray) -> Any:
        """What a worker makes of one batch."""
        return self.cut(positions)

    def cut(self, positions: np.ndarray) -> Batch:
        """Decode and crop the images at manifest positions int64 [n]."""
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


def _iterate(reader: ViewReader, batches: list[np.ndarray], workers: int) -> Iterator[Any]:
    loader = DataLoader(
        reader,
        sampler=batches,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_keep_quiet,
        # a fork starts at once, where a fresh process would import torch first
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # an own generator, because starting an iteration draws from the global one
        generator=torch.Generator(),
    )
    iterator = _start(loader)
    try:
        for batch in iterator:
            if isinstance(batch, FastmemError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        # "Caught ..." is torch's account of an exception inside a worker; everything else is about the worker itself
        if not workers or str(error).startswith("Caught "):
            raise
        raise FastmemError(
            f"expected {workers} worker processes to read images until the end, got one that died ({error}); it may "
            "have run out of memory or of shared memory: use fewer workers (0 for none) or smaller batches"
        ) from error
    finally:
        # the last reference: this stops the workers
        del iterator


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers so that signals neither stop them nor reach the caller's code through them."""
    # Ctrl-C reaches the whole process group: workers inherit that it is held back, and the parent stops them itself
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    child_handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        # torch's handler raises for a dead worker wherever the caller happens to be; without it the next batch does
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, child_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _keep_quiet(worker: int) -> None:
    # the thread that hands over shared memory reports through this hook that an interrupted parent hung up
    sys.excepthook = _all_but_hang_ups


def _all_but_hang_ups(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _unchanged(batch: Any) -> Any:
    return batch


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


def _default_workers(batches: list[np.ndarray], recipe: Views) -> int:
    if sum(map(len, batches)) < FEW_IMAGES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(MAX_WORKERS, cores - 1)
    # batches travel through shared memory, of which a container often has only 64 MB; a worker dies when it is full
    if os.path.isdir("/dev/shm"):
        space = os.statvfs("/dev/shm")
        batch_bytes = max(map(len, batches)) * recipe.count * recipe.size**2 * 3
        workers = min(workers, space.f_bavail * space.f_frsize // ((PREFETCH + 1) * batch_bytes))
    return workers
