"""Build or extend an index of image embeddings, so that an interrupted run can be resumed with little loss.

New vectors are first saved to numbered files in the folder pending/, each with the image ids and names of its rows. A
file always ends between two batches, so a resumed run embeds the same batches as a run without interruption. At the end
all pending vectors are added to the index in order.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from fastmem.data.decoding import Skipped
from fastmem.data.loading import Batch, check_readable, load_views
from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json, write_json
from fastmem.home import home
from fastmem.index import faiss_index
from fastmem.index.embedding import DIMENSIONS, Embedder, SquareResize, UndefinedEmbedding
from fastmem.index.files import (
    IndexHeader,
    check_same_embedder,
    read_header,
    read_images,
    remove_leftovers,
    write_index,
)
from fastmem.index.pending import PendingPart, read_pending
from fastmem.reporter import SILENT, Reporter, size, time_left
from fastmem.runs.folder import check_writable
from fastmem.runs.interruption import Interruption
from fastmem.runs.owner import owned

BUILD_SCHEMA = "fastmem.index-build/1"
# pending vectors are added to the index this many at a time
FOLD_BLOCK = 16_384


class BuildShape(TypedDict):
    """The entries of pending/build.json."""

    factory: str


@dataclass(frozen=True)
class IndexPlan:
    """The expected size and duration of building an index.

    Attributes:
        embedder: name of the embedder.
        images: number of images to embed.
        known: number of images that were embedded before.
        disk_bytes: space on disk, in bytes, needed while the index is built.
        seconds: duration at the measured speed; None where no speed was measured.
        things: plural noun for what is counted.
    """

    embedder: str
    images: int
    known: int
    disk_bytes: int
    seconds: float | None
    things: str = "images"

    @property
    def total(self) -> int:
        """Number of images to embed."""
        return self.images

    def __str__(self) -> str:
        images = f"{self.images:,} images" + (f" ({self.known:,} are done)" if self.known else "")
        disk = f"about {size(self.disk_bytes)} on disk"
        return f"embedding {images} with {self.embedder}, {disk}{time_left(self.seconds)}"


@dataclass(frozen=True)
class IndexResult:
    """The result of building or extending an index.

    Attributes:
        path: folder of the index.
        header: description of the index, as in its index.json.
        embedded: number of images embedded by this call.
        seconds: duration of this call.
    """

    path: Path
    header: IndexHeader
    embedded: int
    seconds: float


def default_index_folder(manifest: Manifest, embedder: Embedder) -> Path:
    """Return the default folder of an index, below FASTMEM_HOME: one for every image set and embedder."""
    return home() / "indexes" / f"{embedder.name}-{manifest.hash[:16]}"


def build_index(
    source: ImageSource,
    embedder: Embedder,
    out: str | Path | None = None,
    *,
    factory: str | None = None,
    resume: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> IndexResult:
    """Embed every image of ``source`` and build an index of them, or add the missing images to an existing index.

    Args:
        source: the images.
        embedder: the network that turns images into vectors.
        out: folder of the index; None for the default folder below FASTMEM_HOME, where an existing index is extended.
        factory: faiss's name for the kind of index, such as "HNSW32"; None for the kind that an existing index has, and
            for the exact "Flat" in a new one.
        resume: continue an interrupted run, or extend the index, in ``out``.
        batch_size: number of images in one call of the embedder; None for the embedder's own batch size.
        workers: number of processes that decode images; by default up to 4, as cores allow, and none
            for fewer than 256 images.
        seed: chooses the images on which an approximate index is trained and its recall is measured.
        reporter: its ``planned`` is given the `IndexPlan`, and its ``advance`` the number of images done.

    Raises: UsageError where ``out`` holds an index and ``resume`` is False, holds an index of another embedder or
    factory, or cannot be written, or where there are fewer images than an IVF index has cells; InputFileError where no
    image can be read or a file of the index is damaged; KeyboardInterrupt on Ctrl-C, after what is done was saved.
    """
    manifest = Manifest.build(source)
    folder = Path(out) if out is not None else default_index_folder(manifest, embedder)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"expected a batch size of at least 1 image, got {batch_size}")
    check_writable(folder)
    with owned(folder, "index"):
        header = _existing(folder, embedder, resume or out is None)
        build = _Build(folder, embedder, header, _agree_on_factory(folder, header, factory, len(manifest)), seed)
        return build.run(source, manifest, batch_size or embedder.batch_size, workers, reporter)


def _existing(folder: Path, embedder: Embedder, resume: bool) -> IndexHeader | None:
    """Return the header of the index in a folder, or None without one; refuse an index that must not be extended."""
    header = read_header(folder) if (folder / "index.json").exists() else None
    started = (folder / "pending" / "build.json").exists()
    if (header or started) and not resume:
        raise UsageError(
            f"expected a new folder for the index, got {folder}, which holds one: continue or extend it with --resume, "
            "or choose another --out"
        )
    if header is not None:
        check_same_embedder(folder, header, embedder.name, embedder.digest)
    return header


def _agree_on_factory(folder: Path, header: IndexHeader | None, factory: str | None, images: int) -> str:
    """Return faiss's name for the kind of index: that of the existing index, else the one asked for now or before."""
    file = folder / "pending" / "build.json"
    if header is not None:
        if factory not in (None, header.factory):
            raise UsageError(
                f"expected --factory {header.factory} as in the index {folder}, got {factory}: leave it out, or choose "
                "another --out"
            )
        return header.factory
    if factory is None and file.exists():
        factory = read_json(file, BUILD_SCHEMA, BuildShape)["factory"]
    chosen = factory or faiss_index.EXACT
    cells = getattr(faiss_index.new_index(chosen), "nlist", 1)
    if images < cells:
        raise UsageError(f"expected at least {cells} images for {cells} cells, got {images}: use fewer or Flat")
    return chosen


@dataclass
class _Build:
    folder: Path
    embedder: Embedder
    header: IndexHeader | None
    factory: str
    seed: int

    def run(
        self, source: ImageSource, manifest: Manifest, batch_size: int, workers: int | None, reporter: Reporter
    ) -> IndexResult:
        started = time.monotonic()
        self.known = read_images(self.folder, self.header)[0] if self.header else np.empty(0, np.int64)
        done, pending = self._pending()
        left = np.flatnonzero(~np.isin(manifest.ids, np.concatenate([self.known, done])))
        batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
        reporter.planned(self._plan(source, manifest, batches, len(done) + len(self.known)))
        if len(left):
            write_json(self.folder / "pending" / "build.json", {"schema": BUILD_SCHEMA, "factory": self.factory})
        # pending files that are in the index already were removed, so the number of files is not the next number
        number = 1 + max((int(path.stem) for path in pending), default=-1)
        pending += self._embed(source, manifest, batches, number, workers, reporter)
        # without a header there is no index yet, and all images are pending
        if pending or self.header is None:
            self.header = self._fold(pending, source, manifest)
        else:
            remove_leftovers(self.folder, self.header)
        return IndexResult(self.folder, self.header, len(left), time.monotonic() - started)

    def _pending(self) -> tuple[np.ndarray, list[Path]]:
        """Return the ids of images in pending files, and these files; remove files that the index contains already."""
        files, done = [], [np.empty(0, np.int64)]
        for path in sorted((self.folder / "pending").glob("*.safetensors")):
            if not path.stem.isdecimal():
                raise InputFileError(f"expected numbered files of vectors in {path.parent}, got {path.name}: remove it")
            ids, _, header = read_pending(path, self.embedder)
            if len(ids) and np.isin(ids, self.known).all():
                path.unlink()
                continue
            files.append(path)
            done += [ids, np.array(header["skipped_ids"], dtype=np.int64)]
        return np.concatenate(done), files

    def _plan(self, source: ImageSource, manifest: Manifest, batches: list[np.ndarray], known: int) -> IndexPlan:
        """Return the plan; the duration is estimated from one batch that is embedded and thrown away."""
        images, seconds = sum(map(len, batches)), None
        if len(batches) > 4:
            # the first call also allocates memory and chooses kernels, so the second call is timed
            self._probe(source, manifest, batches[0][:1])
            started = time.monotonic()
            self._probe(source, manifest, batches[0])
            seconds = (time.monotonic() - started) / len(batches[0]) * images
        disk = (2 * images + known) * DIMENSIONS * 4
        return IndexPlan(self.embedder.name, images, known, disk, seconds)

    def _probe(self, source: ImageSource, manifest: Manifest, positions: np.ndarray) -> None:
        (batch,) = load_views(source, manifest, [positions], SquareResize(self.embedder.size), workers=0)
        if len(batch.positions):
            self.embedder(batch.views[:, 0].numpy())

    def _vectors(self, batch: Batch, manifest: Manifest) -> np.ndarray:
        """Return the embeddings of a batch, float32 [n,512]. Raises: InputFileError for one that is undefined."""
        try:
            vectors = self.embedder(batch.views[:, 0].numpy())
            wrong = faiss_index.rows_of_other_length(vectors)
        except UndefinedEmbedding as error:
            wrong = np.array([error.row])
        if len(wrong):
            name = manifest.names[batch.positions[wrong[0]]]
            raise InputFileError(
                f"expected an embedding of length 1 for {name}, got one that is not: use another SSCD file, or look at "
                "the image"
            )
        return vectors

    def _embed(
        self,
        source: ImageSource,
        manifest: Manifest,
        batches: list[np.ndarray],
        number: int,
        workers: int | None,
        reporter: Reporter,
    ) -> list[Path]:
        """Embed batches of manifest positions into new pending files, numbered from ``number``."""
        files: list[Path] = []
        part = PendingPart(manifest)

        def save() -> None:
            path = self.folder / "pending" / f"{number + len(files):06d}.safetensors"
            files.append(part.save(path, self.embedder))

        loaded = load_views(source, manifest, batches, SquareResize(self.embedder.size), workers)
        with Interruption() as interruption:
            for positions, batch in zip(batches, loaded, strict=True):
                vectors = self._vectors(batch, manifest) if len(batch.positions) else None
                part.take(positions, batch.positions, vectors, batch.skipped)
                reporter.advance(len(positions))
                if interruption.requested or part.is_due():
                    save()
                    part = PendingPart(manifest)
                if interruption.requested:
                    raise interruption.stopped
            if part.taken:
                save()
        return files

    def _fold(self, files: list[Path], source: ImageSource, manifest: Manifest) -> IndexHeader:
        """Add the pending vectors to the index, in order, and write the index."""
        ids, names, skipped = self._rows_before()
        skipped |= {s.name: s.reason for s in source.skipped}
        for path in files:
            new, _, header = read_pending(path, self.embedder)
            ids.append(new)
            names += header["names"]
            skipped |= {s["name"]: s["reason"] for s in header["skipped"]}
        if not names:
            # the pending files list these images as done, so a later run with repaired images would not read them
            shutil.rmtree(self.folder / "pending")
            check_readable(source, len(skipped), 0, Skipped(*next(iter(skipped.items()))))
        for name in names:
            skipped.pop(name, None)
        index = self._index_before()
        if not index.is_trained:
            faiss_index.train(index, self._training_vectors(files, [len(new) for new in ids]))
        self._add(index, files)
        manifests = dict.fromkeys((*(self.header.manifests if self.header else ()), manifest.hash))
        identity = (self.embedder.name, self.embedder.digest)
        return write_index(
            self.folder, index, np.concatenate(ids), names, identity, self.factory, tuple(manifests), skipped, self.seed
        )

    def _add(self, index: Any, files: list[Path]) -> None:
        """Add the pending vectors to the index in blocks of equal size."""
        # an HNSW graph depends on which vectors are added together, which an interruption must not change
        waiting = np.empty((0, DIMENSIONS), np.float32)
        for path in files:
            waiting = np.concatenate([waiting, read_pending(path, self.embedder)[1]])
            while len(waiting) >= FOLD_BLOCK:
                faiss_index.add(index, waiting[:FOLD_BLOCK])
                waiting = waiting[FOLD_BLOCK:]
        faiss_index.add(index, waiting)

    def _rows_before(self) -> tuple[list[np.ndarray], list[str], dict[str, str]]:
        if self.header is None:
            return [], [], {}
        ids, names = read_images(self.folder, self.header)
        return [ids], names.to_pylist(), {s["name"]: s["reason"] for s in self.header.skipped}

    def _index_before(self) -> Any:
        if self.header is None:
            return faiss_index.new_index(self.factory)
        path = self.folder / self.header.vectors_file
        header = self.header
        return faiss_index.read(path, header.count, header.bytes, in_memory=True, checksum=header.vectors_checksum)

    def _training_vectors(self, files: list[Path], counts: list[int]) -> np.ndarray:
        """Return vectors to train on, float32 [n,512], drawn at random from files of ``counts`` vectors each."""
        chosen, start, found = faiss_index.training_rows(sum(counts), self.seed), 0, []
        for path, count in zip(files, counts, strict=True):
            rows = chosen[(chosen >= start) & (chosen < start + count)] - start
            found.append(read_pending(path, self.embedder)[1][rows])
            start += count
        return np.concatenate(found)
