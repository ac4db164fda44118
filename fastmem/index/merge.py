"""Merge several indexes into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmem.errors import UsageError
from fastmem.index import faiss_index
from fastmem.index.files import IndexHeader, check_same_embedder, write_index
from fastmem.index.search import CLOSE, EmbeddingIndex
from fastmem.runs.folder import check_writable

# vectors that are copied or compared at a time
BLOCK = 65_536


def merge_indexes(
    paths: Sequence[str | Path], out: str | Path, factory: str = faiss_index.EXACT, seed: int = 0
) -> IndexHeader:
    """Write a new index with the rows of several indexes, in their order; an image in two of them is taken once.

    Args:
        paths: folders of the indexes, at least two.
        out: folder of the new index.
        factory: faiss's name for the kind of the new index, such as "Flat" or "HNSW32".
        seed: chooses the images on which an approximate index is trained and its recall is measured.

    Raises: UsageError where there are fewer than two indexes, their embedders differ, two images of the same id have
    different vectors, ``out`` is not empty or cannot be written, or the kind of index cannot be made; InputFileError
    where an index is missing or damaged.
    """
    folder = Path(out)
    if len(paths) < 2:
        raise UsageError(f"expected at least two indexes to merge, got {len(paths)}: name each with --merge INDEX")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"expected a new folder for the merged index, got {folder}, which is not empty: choose another"
        )
    check_writable(folder)
    parts = [EmbeddingIndex(path, "cpu") for path in paths]
    for part in parts[1:]:
        check_same_embedder(part.path, part.header, parts[0].header.embedder, parts[0].header.digest)
    index = faiss_index.new_index(factory)
    kept = _distinct(parts)
    if not index.is_trained:
        faiss_index.train(index, _sample(parts, kept, seed))
    for part, rows in zip(parts, kept, strict=True):
        for start in range(0, len(rows), BLOCK):
            faiss_index.add(index, part.vectors(part.ids[rows[start : start + BLOCK]]))
    ids = np.concatenate([part.ids[rows] for part, rows in zip(parts, kept, strict=True)])
    names = [name for part, rows in zip(parts, kept, strict=True) for name in part.names.take(rows).to_pylist()]
    # an image that could not be read in one set may have been readable in another
    skipped = {s["name"]: s["reason"] for part in parts for s in part.header.skipped}
    for name in skipped.keys() & set(names):
        del skipped[name]
    manifests = tuple(dict.fromkeys(m for part in parts for m in part.header.manifests))
    first = parts[0].header
    return write_index(folder, index, ids, names, (first.embedder, first.digest), factory, manifests, skipped, seed)


def _distinct(parts: Sequence[EmbeddingIndex]) -> list[np.ndarray]:
    """Return, for each index, the rows of images that are in none of the indexes before it."""
    kept: list[np.ndarray] = []
    for number, part in enumerate(parts):
        known = np.zeros(len(part), bool)
        for before in parts[:number]:
            both = before.contains(part.ids)
            shared = part.ids[both]
            for start in range(0, len(shared), BLOCK):
                _check_equal(part, before, shared[start : start + BLOCK])
            known |= both
        kept.append(np.flatnonzero(~known))
    return kept


def _check_equal(part: EmbeddingIndex, before: EmbeddingIndex, ids: np.ndarray) -> None:
    different = np.abs(part.vectors(ids) - before.vectors(ids)).max(1) > CLOSE
    if different.any():
        raise UsageError(
            f"expected an image to have one vector, got two for {part.name(ids[different.argmax()])} in {before.path} "
            f"and {part.path}: different images have the same class and name, so rename one set"
        )


def _sample(parts: Sequence[EmbeddingIndex], kept: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Return vectors to train on, float32 [n,512], drawn at random from the kept rows of all indexes."""
    total = sum(map(len, kept))
    chosen = faiss_index.training_rows(total, seed)
    edges = np.cumsum([0, *map(len, kept)])
    found = []
    for part, rows, start, stop in zip(parts, kept, edges, edges[1:], strict=False):
        found.append(part.vectors(part.ids[rows[chosen[(chosen >= start) & (chosen < stop)] - start]]))
    return np.concatenate(found)
