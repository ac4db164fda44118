"""Make, search and read faiss indexes; a file is checked before faiss reads it.

Only kinds of index that keep whole vectors are accepted, such as ``Flat`` (exact), ``HNSW32`` and ``IVF1024,Flat``:
compressed vectors would give wrong cosines.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fastmem.errors import InputFileError, UsageError
from fastmem.files import file_checksum
from fastmem.index.embedding import DIMENSIONS

EXACT = "Flat"
# an IVF index is trained on at most this many vectors
TRAINING_VECTORS = 262_144
# a file starts with its kind (4 bytes), the dimensions of its vectors and their count
_KINDS = {b"IxFI": "exact", b"IHNf": "HNSW", b"IwFl": "IVF"}
_START = struct.Struct("<4siq")
# lengths of vectors may differ from 1 by this much
LENGTH_TOLERANCE = 1e-3
# recall is the share of the 10 nearest other images that a search finds; a search is widened until it reaches 0.95
RECALL_NEIGHBOURS, RECALL_QUERIES, WANTED_RECALL = 10, 256, 0.95
# effort is the number of candidates of an HNSW search, or of cells of an IVF search
MAX_EFFORT = 4096


def new_index(factory: str) -> Any:
    """Return an empty index that searches by inner product; ``factory`` is faiss's name for its kind, such as "HNSW32".

    Raises: UsageError where faiss does not know the kind, or where it does not keep whole vectors.
    """
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
    """Let an IVF index choose its cells from vectors, float32 [n,512]; other kinds of index need no training.

    Raises: UsageError where there are fewer vectors than cells.
    """
    if index.is_trained:
        return
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise UsageError(
            f"expected at least {index.nlist} images for {index.nlist} cells, got {len(vectors)}: use fewer or Flat"
        ) from error
    # this table finds a vector by its row; faiss updates it when vectors are added
    index.make_direct_map()


def add(index: Any, vectors: np.ndarray) -> None:
    """Append vectors, float32 [n,512], to an index; the same calls always make the same index.

    Raises: InputFileError where a vector is not finite or not of length 1.
    """
    check_unit_length(vectors, "vectors that are added to an index")
    threads = faiss.omp_get_max_threads()
    # with several threads the links of an HNSW graph would depend on which thread is faster
    if isinstance(index, faiss.IndexHNSWFlat):
        faiss.omp_set_num_threads(1)
    try:
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(threads)


def write(index: Any, path: Path) -> None:
    """Write an index to a file. Raises: OSError where it cannot be written, for instance on a full disk."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[-1][:160]) from error


def read(path: Path, count: int, size: int, in_memory: bool = False, checksum: str = "") -> Any:
    """Read an index from a file, and check that it is the expected one.

    Args:
        path: the file.
        count: expected number of vectors.
        size: expected size of the file, in bytes.
        in_memory: load the index so that it can be changed; otherwise its file is mapped into memory for searches.
        checksum: expected CRC-32 of the file; empty for one that is not known.

    Raises: InputFileError where the file is missing, is damaged, has another size or number of vectors, or a vector is
    not finite or not of length 1.
    """
    kind = _check_file(path, count, size)
    # damage in the links of a graph would end the process in a search
    check_sum(path, checksum)
    # faiss has one flag to map the lists of an IVF index, and another to map plain arrays
    mapped = faiss.IO_FLAG_MMAP if kind == "IVF" else faiss.IO_FLAG_MMAP_IFC
    try:
        index = faiss.read_index(str(path), 0 if in_memory else mapped)
    except (RuntimeError, MemoryError) as error:
        raise _damaged(path, str(error).splitlines()[-1][:160]) from error
    whole = isinstance(index, (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat))
    if not whole or (index.ntotal, index.d, index.metric_type) != (count, DIMENSIONS, faiss.METRIC_INNER_PRODUCT):
        raise _damaged(path, f"a {type(index).__name__} of {index.ntotal} vectors")
    for vectors in _stored(index):
        check_unit_length(vectors, str(path))
    return index


def _stored(index: Any) -> Iterable[np.ndarray]:
    """Yield all vectors of an index in parts, float32 [n,512], without a copy."""
    if isinstance(index, faiss.IndexIVFFlat):
        lists: Any = index.invlists
        for i in range(lists.nlist):
            size = lists.list_size(i)
            if size:
                codes = faiss.rev_swig_ptr(lists.get_codes(i), size * index.code_size)
                yield codes.view(np.float32).reshape(size, DIMENSIONS)
        return
    flat: Any = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSWFlat) else index
    yield faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * DIMENSIONS).reshape(flat.ntotal, DIMENSIONS)


def check_unit_length(vectors: np.ndarray, where: str) -> None:
    """Check that vectors, float32 [n,512], are finite and of length 1; ``where`` says for the message what they are.

    Raises: InputFileError where one is not.
    """
    wrong = rows_of_other_length(vectors)
    if len(wrong):
        raise InputFileError(
            f"expected vectors of length 1 in {where}, got {len(wrong)} others, the first in row {wrong[0]}: make the "
            "index again"
        )


def rows_of_other_length(vectors: np.ndarray) -> np.ndarray:
    """Return the rows of vectors, float32 [n,512], that are not finite or not of length 1: int64, ascending."""
    squares = np.einsum("nd,nd->n", vectors, vectors)
    # NaN is not close to anything
    return np.flatnonzero(~(np.abs(squares - 1) <= 2 * LENGTH_TOLERANCE))


def _check_file(path: Path, count: int, size: int) -> str:
    """Check the size and the first bytes of a file before faiss reads it, and return the kind of index."""
    try:
        found = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(_START.size)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if found != size or found < max(_START.size, count * DIMENSIONS * 4):
        raise _damaged(path, f"{found} bytes instead of {size}")
    kind, dimensions, vectors = _START.unpack(start)
    if kind not in _KINDS or (dimensions, vectors) != (DIMENSIONS, count):
        raise _damaged(path, f"{vectors} vectors of {dimensions} in {kind!r} instead of {count} of {DIMENSIONS}")
    return _KINDS[kind]


def check_sum(path: Path, expected: str) -> None:
    """Check a file of an index against the CRC-32 in index.json; an empty one is not checked.

    Raises: InputFileError where the file has another one.
    """
    if expected and file_checksum(path) != expected:
        raise InputFileError(
            f"expected the file {path} that index.json was written with, got another or a damaged one: make the index "
            "again"
        )


def vectors_at(index: Any, rows: np.ndarray) -> np.ndarray:
    """Return the vectors, float32 [n,512], in the rows int64 [n] of an index."""
    return index.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))


def is_exact(index: Any) -> bool:
    """Return whether a search compares a query with every vector of the index."""
    return isinstance(index, faiss.IndexFlat)


def set_effort(index: Any, effort: int) -> None:
    """Set how far an approximate search looks: the candidates of an HNSW search, or the cells of an IVF search."""
    name = "nprobe" if isinstance(index, faiss.IndexIVFFlat) else "efSearch"
    faiss.ParameterSpace().set_index_parameter(index, name, effort)


def tune(index: Any, seed: int) -> tuple[int, float]:
    """Raise the effort of an approximate index until its recall is 0.95 or the effort is at its limit; return both.

    Recall is the share of the 10 nearest other images that a search finds, for 256 images that ``seed`` chooses.
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
    """Return the ``width`` nearest rows of each query, float32 [q,512], by exact search: int64 [q,width]."""
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
    """Return the share of the nearest rows ``truth`` [q,w] that were ``found``, without each query's own row."""
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
    """Return which of ``total`` rows an index is trained on: int64, ascending, at most 262,144, chosen by ``seed``."""
    return np.sort(np.random.default_rng(seed).choice(total, min(total, TRAINING_VECTORS), replace=False))
