"""The files of an index, and the checks they pass before anything is taken from them.

index.json          what it is: embedder, images, factory, recall; written last, so what it names is whole
vectors-N.faiss     the vectors, as faiss writes them
images-N.parquet    id and class/name of every row
pending/            vectors that are not in it yet, while it is made or extended
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json, write_atomically, write_json, write_table
from fastmem.index import faiss_index

SCHEMA = "fastmem.index/1"


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

    effort, recall = (0, 1.0) if faiss_index.is_exact(index) else faiss_index.tune(index, seed)
    rows = tuple({"name": name, "reason": reason} for name, reason in sorted(skipped.items()))
    header = IndexHeader(*embedder, len(ids), factory, effort, recall, tuple(manifests), 0, rows)
    vectors_file = folder / header.vectors_file
    write_atomically(vectors_file, lambda partial: faiss_index.write(index, partial))
    write_table(folder / header.images_file, {"id": ids, "name": pyarrow.array(names, pyarrow.string())})
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
    if not wrong:
        rows = all(isinstance(row, dict) and row.keys() == {"name", "reason"} for row in document["skipped"])
        wrong += [] if rows else ["skipped"]
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
