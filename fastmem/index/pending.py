"""Files of vectors that are embedded but not yet in the index, each with the ids and names of its rows."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
import torch

from fastmem.data.decoding import Skipped
from fastmem.data.manifest import Manifest
from fastmem.errors import InputFileError, UsageError
from fastmem.files import check_tensors, read_tensors, write_tensors
from fastmem.index.embedding import DIMENSIONS, Embedder
from fastmem.index.faiss_index import check_unit_length
from fastmem.index.files import SkippedImage

PENDING_SCHEMA = "fastmem.index-pending/1"
# a file is saved when either of these is reached, so that an interruption loses little work
SAVE_SECONDS = 60.0
SAVE_IMAGES = 8192

Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class PendingShape(TypedDict):
    """The header of a pending file."""

    embedder: str
    digest: str
    names: list[str]
    skipped: list[SkippedImage]
    skipped_ids: list[Id]


class PendingPart:
    """Collects the vectors of the images of ``manifest`` that go into one pending file."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._rows: list[np.ndarray] = []
        self._vectors = [np.empty((0, DIMENSIONS), np.float32)]
        self._missing: list[np.ndarray] = []
        self._skipped: list[Skipped] = []
        self._started = time.monotonic()
        self.taken = 0

    def take(self, asked: np.ndarray, rows: np.ndarray, vectors: np.ndarray | None, skipped: list[Skipped]) -> None:
        """Collect the vectors of one batch.

        Args:
            asked: int64 [n], manifest positions of the batch.
            rows: int64 [m], those of them that could be read.
            vectors: float32 [m,512], their vectors; None where none could be read.
            skipped: the images that could not be read, with the reasons.
        """
        self.taken += len(asked)
        self._rows.append(rows)
        self._vectors += [] if vectors is None else [vectors]
        self._missing.append(np.setdiff1d(asked, rows))
        self._skipped += skipped

    def is_due(self) -> bool:
        """Return whether it is time to save the file: after 60 seconds or 8,192 images."""
        return self.taken >= SAVE_IMAGES or time.monotonic() - self._started > SAVE_SECONDS

    def save(self, path: Path, embedder: Embedder) -> Path:
        """Write the collected vectors to ``path``, with the name of the ``embedder`` that made them; return ``path``.

        Raises: UsageError where the folder cannot be written.
        """
        rows, missing = np.concatenate(self._rows), np.concatenate(self._missing)
        header = {
            "embedder": embedder.name,
            "digest": embedder.digest,
            "names": self._manifest.names[rows].tolist(),
            "skipped": [asdict(s) for s in self._skipped],
            "skipped_ids": self._manifest.ids[missing].tolist(),
        }
        tensors = {"ids": self._manifest.ids[rows], "vectors": np.concatenate(self._vectors)}
        write_tensors(path, {k: torch.from_numpy(v) for k, v in tensors.items()}, PENDING_SCHEMA, header)
        return path


def read_pending(path: Path, embedder: Embedder) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the image ids, int64 [n], the vectors, float32 [n,512], and the header of one pending file.

    Raises: InputFileError where the file is damaged or a vector is not of length 1; UsageError where another embedder
    than ``embedder`` made it.
    """
    try:
        tensors, header = read_tensors(path, PENDING_SCHEMA, PendingShape)
        rows = len(header["names"])
        check_tensors(path, tensors, {"ids": ("int64", (rows,)), "vectors": ("float32", (rows, DIMENSIONS))})
        check_unit_length(tensors["vectors"].numpy(), str(path))
    except InputFileError as error:
        raise InputFileError(
            f"expected vectors with ids and names in {path}, got others ({error}): remove that file and resume"
        ) from error
    if (header["embedder"], header["digest"]) != (embedder.name, embedder.digest):
        raise UsageError(
            f"expected vectors of {embedder.name} in {path}, got those of {header['embedder']}: resume with the "
            "same embedder, or choose another --out"
        )
    return tensors["ids"].numpy(), tensors["vectors"].numpy(), header
