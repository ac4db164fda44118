"""Search an index for the images nearest to given embeddings, by cosine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmem.errors import UsageError
from fastmem.index import faiss_index
from fastmem.index.embedding import DIMENSIONS, Embedder
from fastmem.index.files import check_same_embedder, read_header, read_images
from fastmem.index.nearest import FaissNearest, choose_nearest
from fastmem.models.checkpoints import resolve_device

# queries that are searched at a time
QUERY_BLOCK = 1024
# a search first fetches SPARE rows more than asked for, because its float32 products may be off by up to CLOSE
SPARE, CLOSE = 7, 1e-5
# vectors whose exact cosines are computed at a time
EXACT_BLOCK = 65_536


@dataclass(frozen=True)
class Neighbours:
    """The k images nearest to each of Q queries, nearest first; of equal cosines the smaller id comes first.

    Where an approximate index finds fewer than k images, the remaining ids are -1 and their cosines -inf.

    Attributes:
        ids: int64 [Q,k], image ids.
        cosines: float32 [Q,k] in [-1,1].
    """

    ids: np.ndarray
    cosines: np.ndarray


class EmbeddingIndex:
    """A finished index of N images, whose vectors are mapped into memory.

    Attributes:
        path: folder of the index.
        header: description of the index, as in its index.json.
        ids: int64 [N], image id of each row.
        names: strings [N], ``class/name`` of each row, an arrow column.
        searched_by: what runs the searches: "faiss-cpu", "faiss-gpu" or "torch-cuda".
    """

    def __init__(
        self, path: str | Path, device: str = "auto", note: Callable[[str], None] = lambda sentence: None
    ) -> None:
        """Open the index in the folder ``path``, to be searched on ``device``.

        ``note`` is given a sentence where the device is a GPU that faiss cannot use. All vectors are read once to check
        them, which takes about a second for the 1.3 million of ImageNet.

        Raises: InputFileError where a file is missing or damaged, the files do not belong together, or a vector is not
        finite or not of length 1; UsageError where there is no such device.
        """
        self.path = Path(path)
        self.header = read_header(self.path)
        self.ids, self.names = read_images(self.path, self.header)
        vectors, header = self.path / self.header.vectors_file, self.header
        self._index = faiss_index.read(vectors, header.count, header.bytes, checksum=header.vectors_checksum)
        self._by_id = np.argsort(self.ids, kind="stable")
        self._cpu = FaissNearest(self._index, "faiss-cpu", self.header.count)
        self._nearest = choose_nearest(self._index, resolve_device(device), note)
        self.searched_by = self._nearest.name

    def __len__(self) -> int:
        return self.header.count

    def check_embedder(self, embedder: Embedder) -> None:
        """Check that ``embedder`` made the vectors. Raises: UsageError where another embedder made them."""
        check_same_embedder(self.path, self.header, embedder.name, embedder.digest)

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Return, for image ids int64 [M], whether the index has a row for each: bool [M]."""
        return self.ids[self._positions(ids)] == ids

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors, float32 [M,512], of image ids int64 [M]. Raises: UsageError where an id has no row."""
        return faiss_index.vectors_at(self._index, self._rows(ids))

    def name(self, image_id: int) -> str:
        """Return the name, ``class/name``, of an image id. Raises: UsageError where the id has no row."""
        return str(self.names[int(self._rows(np.array([image_id]))[0])].as_py())

    def search(self, vectors: np.ndarray, k: int = 1) -> Neighbours:
        """Return the ``k`` images of largest cosine with each query; queries are float32 [Q,512], each of length 1.

        Raises: UsageError where a query has another shape or length, or ``k`` is not from 1 to the number of images.
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
        """Fill ids and cosines [q,k]; fetch more rows as long as a row not yet fetched could be among the nearest k."""
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
        """Return ids and cosines, computed in float64, of proposed rows [q,w], sorted by cosine and then by id."""
        ids, cosines = np.empty_like(rows), np.empty(rows.shape, np.float32)
        # a few queries at a time, because each needs w vectors in memory
        step = max(1, EXACT_BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            vectors = faiss_index.vectors_at(self._index, np.maximum(part, 0).ravel()).reshape(*part.shape, DIMENSIONS)
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
