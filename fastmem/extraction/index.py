"""The index of a training set: one unit vector per image, searched by cosine, with every row's image id and name.

index.json          what it is: embedder, images, factory, recall; written last, so what it names is whole
vectors-N.faiss     the vectors, as faiss writes them
images-N.parquet    id and class/name of every row
pending/            vectors that are not in it yet, while it is made or extended
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.errors import InputFileError, UsageError
from fastmem.extraction import store
from fastmem.extraction.embedding import DIMENSIONS, Embedder
from fastmem.extraction.nearest import FaissNearest, choose_nearest
from fastmem.files import read_json, write_atomically, write_json
from fastmem.models.checkpoints import resolve_device
from fastmem.runs import check_writable

SCHEMA = "fastmem.index/1"
QUERY_BLOCK = 1024
# rows fetched beyond those asked for; float32 products differ by less than CLOSE from the cosines computed afterwards
SPARE, CLOSE = 7, 1e-5
MERGE_BLOCK = 65_536


@dataclass(frozen=True)
class IndexHeader:
    """What index.json says.

    embedder, digest: name of the embedder and SHA-256 of its weights; count: rows; factory: faiss's string; effort: how
    far an approximate search looks, 0 for an exact one; recall: share of the 10 nearest others it finds; manifests:
    hashes of the image sets that went in; bytes: of the vectors' file; skipped: unreadable images, name and reason.
    """

    embedder: str
    digest: str
    count: int
    factory: str
    effort: int
    recall: float
    manifests: tuple[str, ...]
    bytes: int
    skipped: tuple[dict[str, str], ...]

    @property
    def vectors_file(self) -> str:
        return f"vectors-{self.count}.faiss"

    @property
    def images_file(self) -> str:
        return f"images-{self.count}.parquet"


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of each query, nearest first, equal cosines by smallest id.

    ids: int64 [Q,k]; cosines: float32 [Q,k] in [-1,1]. Where an approximate index found fewer than k, the id is -1 and
    the cosine -inf.
    """

    ids: np.ndarray
    cosines: np.ndarray


class EmbeddingIndex:
    """A finished index, mapped into memory.

    Attributes:
        path: its folder.
        header: what it is.
        ids: int64 [N], image ids in row order.
        searched_by: faiss-cpu, faiss-gpu, or torch-cuda.
    """

    def __init__(
        self, path: str | Path, device: str = "auto", note: Callable[[str], None] = lambda sentence: None
    ) -> None:
        """Open an index; ``device``: where to search; ``note``: told where a GPU is there and something else searches.

        Raises: InputFileError where a file is missing, damaged or not the others'; UsageError for a wrong device.
        """
        self.path = Path(path)
        self.header = read_header(self.path)
        self.ids, self._names = read_images(self.path, self.header)
        self._index = store.read(self.path / self.header.vectors_file, self.header.count, self.header.bytes)
        self._by_id = np.argsort(self.ids, kind="stable")
        self._cpu = FaissNearest(self._index, "faiss-cpu", self.header.count)
        self._nearest = choose_nearest(self._index, resolve_device(device), note)
        self.searched_by = self._nearest.name

    def __len__(self) -> int:
        return self.header.count

    def check_embedder(self, embedder: Embedder) -> None:
        """Raises: UsageError where the index was made by another embedder than ``embedder``."""
        check_same_embedder(self.path, self.header, embedder.name, embedder.digest)

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Which image ids have a row, int64 [M] -> bool [M]."""
        return self.ids[self._positions(ids)] == ids

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of images, int64 [M] -> float32 [M,512]. Raises: UsageError for an id without a row."""
        return store.vectors_at(self._index, self._rows(ids))

    def name(self, image_id: int) -> str:
        """``class/name`` of an image. Raises: UsageError for an id without a row."""
        return str(self._names[int(self._rows(np.array([image_id]))[0])].as_py())

    def search(self, vectors: np.ndarray, k: int = 1) -> Neighbours:
        """The ``k`` images of largest cosine with each query, float32 [Q,512] of length 1.

        Raises: UsageError where the queries have another shape or length, or ``k`` is not in 1..count.
        """
        queries = np.ascontiguousarray(vectors, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != DIMENSIONS:
            raise UsageError(
                f"expected queries as [Q,{DIMENSIONS}], got {list(queries.shape)}: use an embedder's vectors"
            )
        if not np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-3):
            raise UsageError("expected queries of length 1, got others: divide them by their length")
        if not 1 <= k <= len(self):
            raise UsageError(f"expected k from 1 to the index's {len(self)} images, got {k}")
        ids = np.empty((len(queries), k), np.int64)
        cosines = np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            self._search_block(queries[block], k, ids[block], cosines[block])
        return Neighbours(ids, cosines)

    def _search_block(self, queries: np.ndarray, k: int, ids: np.ndarray, cosines: np.ndarray) -> None:
        """Fill ids and cosines [q,k]; fetches more rows while the k-th place could still belong to a row not fetched."""
        open_queries, width = np.arange(len(queries)), min(k + SPARE, len(self))
        while len(open_queries):
            nearest = self._nearest if width <= self._nearest.max_width else self._cpu
            rows = nearest(queries[open_queries], width)
            found, exact = self._ordered(queries[open_queries], rows)
            ids[open_queries], cosines[open_queries] = found[:, :k], exact[:, :k]
            if width == len(self):
                return
            open_queries = open_queries[exact[:, -1] >= exact[:, k - 1] - CLOSE]
            width = min(4 * width, len(self))

    def _ordered(self, queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and cosines of proposed rows [q,w], by cosine and then id; computed in float64 from the vectors."""
        ids, cosines = np.empty_like(rows), np.empty(rows.shape, np.float32)
        # a few queries at a time, because of the vectors of w rows each
        step = max(1, MERGE_BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            vectors = store.vectors_at(self._index, np.maximum(part, 0).ravel()).reshape(*part.shape, DIMENSIONS)
            asked = queries[start : start + step].astype(np.float64)
            values = np.einsum("qd,qwd->qw", asked, vectors.astype(np.float64)).astype(np.float32)
            values = np.where(part < 0, np.float32(-np.inf), values.clip(-1, 1))
            names = np.where(part < 0, -1, self.ids[np.maximum(part, 0)])
            order = np.lexsort((names, -values))
            ids[start : start + step] = np.take_along_axis(names, order, 1)
            cosines[start : start + step] = np.take_along_axis(values, order, 1)
        return ids, cosines

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        where = np.searchsorted(self.ids, ids, sorter=self._by_id)
        return self._by_id[np.minimum(where, len(self) - 1)]

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        rows = self._positions(ids)
        unknown = np.flatnonzero(self.ids[rows] != ids)
        if len(unknown):
            raise UsageError(
                f"expected ids of images in the index {self.path}, got {len(unknown)} that are not there, the first "
                f"{ids[unknown[0]]}: extend it with `fastmem index --data PATH --out {self.path} --resume`"
            )
        return rows


def merge_indexes(
    paths: Sequence[str | Path], out: str | Path, factory: str = store.EXACT, seed: int = 0
) -> IndexHeader:
    """Put the rows of several indexes into a new one, in the order given; an image that is in two of them comes once.

    Raises: UsageError where there are fewer than two, the embedders differ, an image id stands for two different
    vectors, ``out`` exists or cannot be written, or the factory does not fit; InputFileError for a damaged one.
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
    kept = _distinct(parts)
    index = store.new_index(factory)
    if not index.is_trained:
        store.train(index, _sample(parts, kept, seed))
    for part, rows in zip(parts, kept, strict=True):
        for start in range(0, len(rows), MERGE_BLOCK):
            store.add(index, store.vectors_at(part._index, rows[start : start + MERGE_BLOCK]))
    ids = np.concatenate([part.ids[rows] for part, rows in zip(parts, kept, strict=True)])
    names = [part._names[row].as_py() for part, rows in zip(parts, kept, strict=True) for row in rows.tolist()]
    skipped = {s["name"]: s["reason"] for part in parts for s in part.header.skipped}
    manifests = tuple(dict.fromkeys(m for part in parts for m in part.header.manifests))
    first = parts[0].header
    return write_index(folder, index, ids, names, (first.embedder, first.digest), factory, manifests, skipped, seed)


def _distinct(parts: Sequence[EmbeddingIndex]) -> list[np.ndarray]:
    """The rows of each part whose images are in no part before it."""
    kept: list[np.ndarray] = []
    for number, part in enumerate(parts):
        known = np.zeros(len(part), bool)
        for before in parts[:number]:
            both = before.contains(part.ids)
            shared = part.ids[both]
            different = np.abs(part.vectors(shared) - before.vectors(shared)).max(1, initial=0) > CLOSE
            if different.any():
                raise UsageError(
                    f"expected an image to have one vector, got two for {part.name(shared[different.argmax()])} in "
                    f"{before.path} and {part.path}: different images have the same class and name, so rename one set"
                )
            known |= both
        kept.append(np.flatnonzero(~known))
    return kept


def _sample(parts: Sequence[EmbeddingIndex], kept: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Vectors to train on, float32 [n,512], drawn evenly by ``seed``."""
    total = sum(map(len, kept))
    chosen = training_rows(total, seed)
    edges = np.cumsum([0, *map(len, kept)])
    found = []
    for part, rows, start, stop in zip(parts, kept, edges, edges[1:], strict=False):
        found.append(store.vectors_at(part._index, rows[chosen[(chosen >= start) & (chosen < stop)] - start]))
    return np.concatenate(found)


def training_rows(total: int, seed: int) -> np.ndarray:
    """Which of ``total`` rows an index is trained on, int64 ascending, at most 262,144."""
    return np.sort(np.random.default_rng(seed).choice(total, min(total, store.TRAINING_VECTORS), replace=False))


def write_index(
    folder: Path,
    index: Any,
    ids: np.ndarray,
    names: Sequence[str],
    embedder: tuple[str, str],
    factory: str,
    manifests: Sequence[str],
    skipped: dict[str, str],
    seed: int,
) -> IndexHeader:
    """Write vectors, images and at last index.json, which makes them the index; then remove what was before."""
    import pyarrow
    from pyarrow import parquet

    effort, recall = (0, 1.0) if store.is_exact(index) else store.tune(index, seed)
    rows = tuple({"name": name, "reason": reason} for name, reason in sorted(skipped.items()))
    header = IndexHeader(*embedder, len(ids), factory, effort, recall, tuple(manifests), 0, rows)
    vectors_file = folder / header.vectors_file
    write_atomically(vectors_file, lambda partial: store.write(index, partial))
    table = pyarrow.table({"id": pyarrow.array(ids), "name": pyarrow.array(names, pyarrow.string())})
    write_atomically(folder / header.images_file, lambda partial: parquet.write_table(table, partial))
    header = IndexHeader(**(asdict(header) | {"bytes": vectors_file.stat().st_size, "skipped": rows}))
    write_json(folder / "index.json", {"schema": SCHEMA, **asdict(header)})
    remove_leftovers(folder, header)
    return header


def remove_leftovers(folder: Path, header: IndexHeader) -> None:
    """Remove what a finished index no longer needs."""
    for pattern, kept in (("vectors-*.faiss", header.vectors_file), ("images-*.parquet", header.images_file)):
        for path in folder.glob(pattern):
            if path.name != kept:
                path.unlink()
    shutil.rmtree(folder / "pending", ignore_errors=True)


def read_header(folder: Path) -> IndexHeader:
    """index.json. Raises: InputFileError where it is missing, damaged or lacks something."""
    document = read_json(folder / "index.json", SCHEMA)
    del document["schema"]
    types = {"embedder": str, "digest": str, "count": int, "factory": str, "effort": int, "recall": float, "bytes": int}
    types |= {"manifests": list, "skipped": list}
    wrong = [f.name for f in fields(IndexHeader) if not isinstance(document.get(f.name), types[f.name])]
    wrong += [name for name in document if name not in types]
    if wrong or document["count"] < 1:
        raise InputFileError(
            f"expected a whole {SCHEMA} document in {folder / 'index.json'}, got a wrong {(wrong or ['count'])[0]}: "
            "make the index again"
        )
    return IndexHeader(**document | {"manifests": tuple(document["manifests"]), "skipped": tuple(document["skipped"])})


def read_images(folder: Path, header: IndexHeader) -> tuple[np.ndarray, Any]:
    """Ids int64 [N] and names (an arrow column) of the rows. Raises: InputFileError where they are not the header's."""
    import pyarrow
    from pyarrow import parquet

    path = folder / header.images_file
    try:
        table = parquet.read_table(path, columns=["id", "name"], partitioning=None)
        ids = table["id"].to_numpy()
        if ids.dtype != np.int64 or len(ids) != header.count or len(np.unique(ids)) != header.count:
            raise ValueError(f"{len(ids)} rows of {header.count}, or an id twice")
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        raise InputFileError(
            f"expected {header.count} different images in {path}, got a file that cannot be used ({error}): make the "
            "index again"
        ) from error
    return ids, table["name"]


def check_same_embedder(folder: Path, header: IndexHeader, name: str, digest: str) -> None:
    """Raises: UsageError where an index was made by another embedder than the one named."""
    if (header.embedder, header.digest) != (name, digest):
        raise UsageError(
            f"expected vectors of {name} ({digest[:12]}) in the index {folder}, got those of {header.embedder} "
            f"({header.digest[:12]}), and different embedders cannot be compared: use the same one, or make a new index"
        )
