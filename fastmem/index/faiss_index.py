"""What faiss is asked to do: indexes that keep whole vectors, made from a factory string, checked before they are read.

An index whose vectors are compressed would give cosines that are not the images', so only those that keep them whole
are taken: ``Flat`` (exact), ``HNSW32``, ``IVF1024,Flat`` and their like.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fastmem.errors import InputFileError, UsageError
from fastmem.index.embedding import DIMENSIONS

EXACT = "Flat"
TRAINING_VECTORS = 262_144
# the first bytes of each file: kind, dimensions, count
_KINDS = {b"IxFI": "exact", b"IHNf": "HNSW", b"IwFl": "IVF"}
_START = struct.Struct("<4siq")
# recall is measured as the share of the 10 nearest others that are found, and effort raised until it is this high
RECALL_NEIGHBOURS, RECALL_QUERIES, WANTED_RECALL = 10, 256, 0.95
MAX_EFFORT = 4096


def new_index(factory: str) -> Any:
    """An empty index by inner product. Raises: UsageError for a string that faiss cannot read or that loses vectors."""
    try:
        index = faiss.index_factory(DIMENSIONS, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(
            f"expected an index factory such as Flat, HNSW32 or IVF1024,Flat, got {factory!r}, which faiss cannot read"
        ) from error
    if not isinstance(index, (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat)):
        raise UsageError(
            f"expected an index factory that keeps whole vectors, such as Flat, HNSW32 or IVF1024,Flat, got {factory!r}"
        )
    return index


def train(index: Any, vectors: np.ndarray) -> None:
    """Let an IVF index choose its cells from vectors, float32 [n,512]. Raises: UsageError where there are too few."""
    if index.is_trained:
        return
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise UsageError(
            f"expected at least {index.nlist} images for {index.nlist} cells, got {len(vectors)}: use fewer or Flat"
        ) from error
    # kept up to date by every addition, it finds a vector by its row
    index.make_direct_map()


def add(index: Any, vectors: np.ndarray) -> None:
    """Append vectors, float32 [n,512]; the same calls make the same index."""
    threads = faiss.omp_get_max_threads()
    # several threads link a graph's points in an order of their own
    if isinstance(index, faiss.IndexHNSWFlat):
        faiss.omp_set_num_threads(1)
    try:
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(threads)


def write(index: Any, path: Path) -> None:
    """Write an index to a file. Raises: OSError where there is no room."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[-1][:160]) from error


def read(path: Path, count: int, size: int, in_memory: bool = False) -> Any:
    """Read an index of ``count`` vectors from a file of ``size`` bytes, mapped into memory unless it is to be changed.

    Raises: InputFileError where the file is missing, of another size, or not such an index.
    """
    kind = _check_file(path, count, size)
    # faiss maps the lists of an IVF index by one flag, and plain arrays by another
    mapped = faiss.IO_FLAG_MMAP if kind == "IVF" else faiss.IO_FLAG_MMAP_IFC
    try:
        index = faiss.read_index(str(path), 0 if in_memory else mapped)
    except (RuntimeError, MemoryError) as error:
        raise _damaged(path, str(error).splitlines()[-1][:160]) from error
    whole = isinstance(index, (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat))
    if not whole or (index.ntotal, index.d, index.metric_type) != (count, DIMENSIONS, faiss.METRIC_INNER_PRODUCT):
        raise _damaged(path, f"a {type(index).__name__} of {index.ntotal} vectors")
    return index


def _check_file(path: Path, count: int, size: int) -> str:
    """Size and first bytes, before faiss trusts what they say; returns the kind."""
    try:
        found = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(_START.size)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if found != size or found < count * DIMENSIONS * 4:
        raise _damaged(path, f"{found} bytes instead of {size}")
    kind, dimensions, vectors = _START.unpack(start)
    if kind not in _KINDS or (dimensions, vectors) != (DIMENSIONS, count):
        raise _damaged(path, f"{vectors} vectors of {dimensions} in {kind!r} instead of {count} of {DIMENSIONS}")
    return _KINDS[kind]


def vectors_at(index: Any, rows: np.ndarray) -> np.ndarray:
    """The vectors of rows, int64 [n] -> float32 [n,512]."""
    return index.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))


def is_exact(index: Any) -> bool:
    """Whether a search compares with every vector."""
    return isinstance(index, faiss.IndexFlat)


def set_effort(index: Any, effort: int) -> None:
    """How far an approximate search looks: candidates of an HNSW search, or cells of an IVF search."""
    name = "nprobe" if isinstance(index, faiss.IndexIVFFlat) else "efSearch"
    faiss.ParameterSpace().set_index_parameter(index, name, effort)


def tune(index: Any, seed: int) -> tuple[int, float]:
    """Raise an approximate index's effort until its recall is 0.95 or nothing is left to raise; returns both.

    Recall: the share of the 10 nearest other images, by exact search, that are found, over 256 drawn by ``seed``.
    """
    count = index.ntotal
    rows = np.sort(np.random.default_rng(seed).choice(count, min(RECALL_QUERIES, count), replace=False))
    width = min(RECALL_NEIGHBOURS + 1, count)
    queries = vectors_at(index, rows)
    truth = exact_rows(index, queries, width)
    most = min(index.nlist, MAX_EFFORT) if isinstance(index, faiss.IndexIVFFlat) else MAX_EFFORT
    effort = 1 if isinstance(index, faiss.IndexIVFFlat) else 16
    while True:
        set_effort(index, effort)
        recall = _recall(rows, truth, index.search(queries, width)[1])
        if recall >= WANTED_RECALL or effort >= most:
            return effort, round(recall, 4)
        effort = min(2 * effort, most)


def exact_rows(index: Any, queries: np.ndarray, width: int) -> np.ndarray:
    """The ``width`` nearest rows by exact search in blocks, whatever the index: int64 [q,width]."""
    best = np.full((len(queries), width), -np.inf, np.float32)
    rows = np.full((len(queries), width), -1, np.int64)
    for start in range(0, index.ntotal, 65_536):
        block = np.arange(start, min(start + 65_536, index.ntotal))
        scores = np.concatenate([best, queries @ vectors_at(index, block).T], axis=1)
        candidates = np.concatenate([rows, np.broadcast_to(block, (len(queries), len(block)))], axis=1)
        top = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        best, rows = np.take_along_axis(scores, top, 1), np.take_along_axis(candidates, top, 1)
    return rows


def _recall(own: np.ndarray, truth: np.ndarray, found: np.ndarray) -> float:
    """Share of the true others, rows [q,w] without each query's own, that were found."""
    pairs: Iterable[tuple[set[int], set[int]]] = (
        (set(t.tolist()) - {o}, set(f.tolist())) for o, t, f in zip(own.tolist(), truth, found, strict=True)
    )
    hits = total = 0
    for others, reached in pairs:
        hits += len(others & reached)
        total += len(others)
    return hits / total if total else 1.0


def _damaged(path: Path, what: str) -> InputFileError:
    return InputFileError(f"expected the vectors of an index in {path}, got {what}: make the index again")


def training_rows(total: int, seed: int) -> np.ndarray:
    """Which of ``total`` rows an index is trained on, int64 ascending, at most 262,144."""
    return np.sort(np.random.default_rng(seed).choice(total, min(total, TRAINING_VECTORS), replace=False))
