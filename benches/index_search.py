"""Search in an index of ImageNet's size: exact against HNSW and IVF, loading by memory map, and growth.

1,281,167 clustered unit vectors of 512 with 5,000 planted near-copies: a query is a planted vector moved to a cosine of
0.6 to 0.95. Exact search must name the planted row for those it can name at all; recall of the others is the share of
the queries with an exact cosine of 0.7 or more whose nearest row they find. An HNSW graph is built by one thread and
takes longer than the bench may: it is measured on the first 80,000 and, where the estimate allows, 320,000 rows.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rows import append_row

from fastmem.index import faiss_index
from fastmem.index.embedding import DIMENSIONS
from fastmem.index.files import write_index
from fastmem.index.search import EmbeddingIndex

COUNT, START, MIDDLE, CLUSTERS, QUERIES, BLOCK = 1_281_167, 80_000, 320_000, 10_000, 5_000, 65_536
EFFORTS = {"HNSW32": (16, 32, 64, 128, 256), "IVF1024,Flat": (1, 4, 16, 64)}
MAX_BUILD_SECONDS, MAX_LOAD_SECONDS, SURE = 900.0, 5.0, 0.7


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n,512] divided by their lengths."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_vectors() -> np.ndarray:
    """Unit vectors around 10,000 centres, float32 [1281167,512]: two of one cluster have a cosine of about 0.5."""
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((CLUSTERS, DIMENSIONS), dtype=np.float32))
    vectors = np.empty((COUNT, DIMENSIONS), np.float32)
    for start in range(0, COUNT, BLOCK):
        count = min(BLOCK, COUNT - start)
        noise = rng.standard_normal((count, DIMENSIONS), dtype=np.float32) / np.sqrt(np.float32(DIMENSIONS))
        vectors[start : start + count] = unit(centres[rng.integers(0, CLUSTERS, count)] + noise)
    return vectors


def plant(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries at a cosine of 0.6 to 0.95 from rows of ``vectors``; returns queries, rows, and cosines."""
    rng = np.random.default_rng(1)
    rows = rng.choice(len(vectors), QUERIES, replace=False)
    cosines = np.linspace(0.6, 0.95, QUERIES, dtype=np.float32)
    targets = vectors[rows]
    noise = rng.standard_normal(targets.shape, dtype=np.float32)
    away = unit(noise - (noise * targets).sum(1, keepdims=True) * targets)
    return cosines[:, None] * targets + np.sqrt(1 - cosines[:, None] ** 2) * away, rows, cosines


def memory() -> float:
    """Resident memory of this process, GiB: 2.44 of it are the vectors that the bench itself keeps."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def record(what: str, count: int, seconds: float, **more: object) -> None:
    """Print one measurement and add it to the table."""
    row = {"what": what, "vectors": count, "seconds": round(seconds, 3), "effort": "", "recall": "", "ms_per_query": ""}
    row |= more | {"gib": round(memory(), 2)}
    print("  ".join(f"{k} {v}" for k, v in row.items() if v != ""), flush=True)
    append_row("index_search", row)


def add(index: Any, vectors: np.ndarray) -> float:
    """Add vectors in blocks; returns the seconds."""
    started = time.monotonic()
    for start in range(0, len(vectors), BLOCK):
        faiss_index.add(index, vectors[start : start + BLOCK])
    return time.monotonic() - started


def save(folder: Path, index: Any) -> float:
    """Write an index with names like ImageNet's; returns the seconds."""
    started = time.monotonic()
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(index.ntotal)]
    write_index(folder, index, np.arange(index.ntotal), names, ("bench-320", "0" * 64), "Flat", [], {}, 0)
    return time.monotonic() - started


def measure_exact(vectors: np.ndarray, folder: Path) -> None:
    """Growth from 80,000 to all, loading, and exact search; then the bounds."""
    index = faiss_index.new_index("Flat")
    record("exact: build", START, add(index, vectors[:START]))
    record("exact: write", START, save(folder, index))
    before = EmbeddingIndex(folder, "cpu").header
    started = time.monotonic()
    index = faiss_index.read(folder / before.vectors_file, before.count, before.bytes, in_memory=True)
    add(index, vectors[START:])
    save(folder, index)
    record("exact: grow from 80,000, read to written", COUNT, time.monotonic() - started)
    del index
    started = time.monotonic()
    opened = EmbeddingIndex(folder, "cpu")
    loading = time.monotonic() - started
    record("exact: load by memory map", COUNT, loading)
    queries, rows, cosines = plant(vectors)
    started = time.monotonic()
    found = opened.search(queries)
    seconds = time.monotonic() - started
    right = found.ids[:, 0] == rows
    share = round(float(right[cosines >= SURE].mean()), 4)
    record("exact: search", COUNT, seconds, recall=share, ms_per_query=round(1000 * seconds / QUERIES, 3))
    error = float(np.abs(found.cosines[right, 0] - cosines[right]).max())
    print(f"planted rows named: {right.mean():.4f}; largest error of a cosine {error:.1e}")
    if loading > MAX_LOAD_SECONDS or share < 1 or error > 1e-5:
        raise SystemExit("loading is too slow, or a planted near-copy was missed, or a cosine is wrong")


def measure_curve(factory: str, vectors: np.ndarray) -> float:
    """Build time, and recall and time of a search by effort; returns the build's seconds."""
    index = faiss_index.new_index(factory)
    started = time.monotonic()
    if not index.is_trained:
        faiss_index.train(index, vectors[faiss_index.training_rows(len(vectors), 0)])
        record(f"{factory}: train", len(vectors), time.monotonic() - started)
    building = add(index, vectors)
    record(f"{factory}: add", len(vectors), building)
    queries, rows, cosines = plant(vectors)
    queries, rows = queries[cosines >= SURE], rows[cosines >= SURE]
    for effort in EFFORTS[factory]:
        faiss_index.set_effort(index, effort)
        started = time.monotonic()
        found = index.search(queries, 1)[1][:, 0]
        seconds = time.monotonic() - started
        recall, per_query = round(float((found == rows).mean()), 4), round(1000 * seconds / len(rows), 3)
        record(f"{factory}: search", len(vectors), seconds, effort=effort, recall=recall, ms_per_query=per_query)
    return building


def main() -> None:
    started = time.monotonic()
    vectors = make_vectors()
    print(f"{COUNT:,} vectors made in {time.monotonic() - started:.0f} s, {memory():.1f} GiB", flush=True)
    with tempfile.TemporaryDirectory() as place:
        measure_exact(vectors, Path(place, "index"))
    seconds = measure_curve("HNSW32", vectors[:START])
    # a graph's steps get longer as it grows: seen at 1.3 times the time per vector for four times the vectors
    for count in (MIDDLE, COUNT):
        estimate = seconds * count / START * 1.3
        if estimate > MAX_BUILD_SECONDS:
            print(f"HNSW32 of {count:,} vectors is not built: it would take about {estimate:.0f} s")
            break
        measure_curve("HNSW32", vectors[:count])
    measure_curve("IVF1024,Flat", vectors)


if __name__ == "__main__":
    main()
