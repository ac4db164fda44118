"""Read, check and write the files of an index.

index.json          the header of the index; written last, so that the files it names are complete
vectors-N.faiss     the N vectors, as faiss writes them
images-N.parquet    id and ``class/name`` of the image in every row
pending/            vectors that are not in the index yet, while it is built or extended
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
    """The description of an index, as it stands in index.json.

    Attributes:
        embedder: name of the embedder that made the vectors.
        digest: SHA-256 of the embedder's model file, in hexadecimal.
        count: number of rows.
        factory: faiss's name for the kind of index, such as "Flat".
        effort: candidates of an HNSW search, or cells of an IVF search; 0 for an exact search.
        recall: share of the 10 nearest other images that a search finds, in [0,1].
        manifests: hashes of the manifests of the image sets in the index.
        bytes: size of the vectors' file.
        skipped: images that could not be read, each with "name" and "reason".
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
    """Write all files of an index, index.json last, and then remove the files of the index that was there before.

    Args:
        folder: folder of the index.
        index: the faiss index with all vectors; the search effort of an approximate one is set here.
        ids: int64 [N], image id of each row.
        names: ``class/name`` of each row.
        embedder: name of the embedder, and SHA-256 of its model file.
        factory: faiss's name for the kind of index.
        manifests: hashes of the manifests of the image sets in the index.
        skipped: reason for each image that could not be read, by name.
        seed: chooses the images for which the recall of an approximate index is measured.

    Raises: UsageError where the folder cannot be written.
    """
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
    """Remove the pending vectors of a finished index, and the files of the index that was there before it."""
    for pattern, kept in (("vectors-*.faiss", header.vectors_file), ("images-*.parquet", header.images_file)):
        for path in folder.glob(pattern):
            if path.name != kept:
                path.unlink()
    shutil.rmtree(folder / "pending", ignore_errors=True)


def read_header(folder: Path) -> IndexHeader:
    """Read the header of an index from index.json in its folder.

    Raises: InputFileError where the file is missing or damaged, or where an entry is missing or of the wrong type.
    """
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
    """Read the image ids, int64 [N], and the names ``class/name``, an arrow column, of the rows of an index.

    Raises: InputFileError where the file is missing or damaged, or has another number of images than the header.
    """
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
    """Check that the vectors of an index come from a given embedder.

    Args:
        folder: folder of the index, for the message.
        header: header of the index.
        name: name of the embedder.
        digest: SHA-256 of the embedder's model file, in hexadecimal.

    Raises: UsageError where another embedder made the vectors.
    """
    if (header.embedder, header.digest) != (name, digest):
        raise UsageError(
            f"expected vectors of {name} ({digest[:12]}) in the index {folder}, got those of {header.embedder} "
            f"({header.digest[:12]}), and different embedders cannot be compared: use the same one, or make a new index"
        )
