"""Read, check and write the files of an index.

index.json          the header of the index; written last, so that the files it names are complete
vectors-N.faiss     the N vectors, as faiss writes them
images-N.parquet    id and ``class/name`` of the image in every row
pending/            vectors that are not in the index yet, while it is built or extended
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np

from fastmem.errors import InputFileError, UsageError
from fastmem.files import file_checksum, read_json, read_table, write_atomically, write_json, write_table
from fastmem.index import faiss_index

SCHEMA = "fastmem.index/1"

Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class SkippedImage(TypedDict):
    """An image that could not be read."""

    name: str
    reason: str


class ChecksumShape(TypedDict, total=False):
    """The check sums of an index's files, which indexes of earlier versions lack."""

    vectors_checksum: str
    images_checksum: str


class HeaderShape(ChecksumShape):
    """The entries of index.json."""

    embedder: str
    digest: str
    count: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    factory: str
    effort: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    recall: Annotated[float, msgspec.Meta(ge=0, le=1)]
    manifests: list[str]
    bytes: Count
    skipped: list[SkippedImage]


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
        vectors_checksum: CRC-32 of the vectors' file; empty in indexes of earlier versions.
        images_checksum: CRC-32 of the images' file; likewise.
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
    vectors_checksum: str = ""
    images_checksum: str = ""

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that tell this index from others, also from those of equally many images."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

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
    header = replace(
        header,
        bytes=vectors_file.stat().st_size,
        vectors_checksum=file_checksum(vectors_file),
        images_checksum=file_checksum(folder / header.images_file),
    )
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
    document = read_json(folder / "index.json", SCHEMA, HeaderShape)
    known = {field.name: document[field.name] for field in fields(IndexHeader) if field.name in document}
    return IndexHeader(**known | {"manifests": tuple(known["manifests"]), "skipped": tuple(known["skipped"])})


def read_images(folder: Path, header: IndexHeader) -> tuple[np.ndarray, Any]:
    """Read the image ids, int64 [N], and the names ``class/name``, an arrow column, of the rows of an index.

    Raises: InputFileError where the file is missing or damaged, or has another number of images than the header.
    """
    path = folder / header.images_file
    table = read_table(path, "images of an index", {"id": "int64", "name": "string"})
    ids = table["id"].to_numpy()
    if len(ids) != header.count or len(np.unique(ids)) != header.count:
        raise InputFileError(
            f"expected {header.count} different images in {path}, got {len(ids)} rows of {header.count}, or an id "
            "twice: make the index again"
        )
    faiss_index.check_sum(path, header.images_checksum)
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
