"""The index of a training set as a stage: embeddings of its images, searched by extraction."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmem.data.sources import ImageSource
from fastmem.errors import FastmemError
from fastmem.index.build import build_index
from fastmem.index.faiss_index import EXACT
from fastmem.index.files import IndexHeader
from fastmem.index.merge import merge_indexes
from fastmem.reporter import QUIET, Reporter
from fastmem.stages.options import USUAL_SSCD, SSCDOptions
from fastmem.stages.result import StageResult


class IndexResult(StageResult):
    """A finished index; ``path`` is its folder."""

    @property
    def count(self) -> int:
        """Images in the index."""
        return int(self.document["images"])


def index(
    source: ImageSource,
    out: str | os.PathLike[str] | None = None,
    factory: str | None = None,
    resume: bool = False,
    *,
    sscd: SSCDOptions = USUAL_SSCD,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    reporter: Reporter = QUIET,
) -> IndexResult:
    """Embed every image of a training set with SSCD and make the index that extraction searches.

    Args:
        source: the images.
        out: the index's folder; None takes the set's own below FASTMEM_HOME, where ``extract`` looks.
        factory: faiss's string, such as "Flat" (exact), "HNSW32" or "IVF1024,Flat"; None takes "Flat", or what the
            index has that is extended.
        resume: go on where a run was interrupted, or add the images that the index lacks.
        sscd: which SSCD model embeds.
        device: of a TorchScript model: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images of one call of the model; None for 16, on a GPU 128.
        workers: processes that decode images; None chooses by cores.
        seed: draws the images on which an approximate index is trained and its recall measured.
        reporter: is told the plan, images that are done, and which model embeds.

    Raises: FastmemError without an SSCD model; UsageError where ``out`` holds an index and ``resume`` is off, one of
    another model or factory, or cannot be written; InputFileError where not one image can be read or a file is damaged.
    KeyboardInterrupt keeps what was finished.
    """
    embedder, reason = sscd.find(device)
    if embedder is None:
        raise FastmemError(f"expected an SSCD model to embed images with, got none: {reason}")
    reporter.note(f"{reason}, as {embedder.name}")
    made = build_index(
        source,
        embedder,
        None if out is None else Path(out),
        factory=factory,
        resume=resume,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        reporter=reporter,
    )
    return IndexResult(made.path, _document(made.path, made.header, made.seconds, made.embedded))


def merge_into_one(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], factory: str | None = None, seed: int = 0
) -> IndexResult:
    """Put the rows of several indexes into a new one; an image that is in two of them comes once.

    Args:
        paths: folders of at least two indexes, in the order of their rows.
        out: the new index's folder.
        factory: faiss's string; None for "Flat".
        seed: draws the images on which an approximate index is trained and its recall measured.

    Raises: as ``merge_indexes``.
    """
    started = time.monotonic()
    header = merge_indexes([Path(path) for path in paths], Path(out), factory or EXACT, seed)
    return IndexResult(Path(out), _document(Path(out), header, time.monotonic() - started, 0))


def _document(path: Path, header: IndexHeader, seconds: float, embedded: int) -> dict[str, Any]:
    return {
        "index": str(path),
        "images": header.count,
        "embedder": header.embedder,
        "factory": header.factory,
        "effort": header.effort,
        "recall": header.recall,
        "bytes": header.bytes,
        "embedded": embedded,
        "seconds": round(seconds, 3),
        "images_per_second": round(embedded / max(seconds, 1e-9), 3),
        "skipped": len(header.skipped),
        "skipped_images": list(header.skipped),
    }
