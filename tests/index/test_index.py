"""The index: exact to the bit of a literal search, mapped, extended, merged, resumed, and never mixed or half read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmem import ArraySource, FolderSource, InputFileError, UsageError
from fastmem.data.manifest import Manifest
from fastmem.files import write_json, write_tensors
from fastmem.index import faiss_index, nearest, pending
from fastmem.index import files as index_files
from fastmem.index.build import build_index, default_index_folder
from fastmem.index.embedding import UndefinedEmbedding, embed
from fastmem.index.files import read_header, write_index
from fastmem.index.merge import merge_indexes
from fastmem.index.search import EmbeddingIndex
from fastmem.reporter import Reporter
from tests.conftest import FakeEmbedder, folder_bytes, random_images, run, run_ranks, write_folder


def unit(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 512)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_index(
    folder: Path, vectors: np.ndarray, ids: np.ndarray | None = None, factory: str = "Flat"
) -> EmbeddingIndex:
    """An index of given vectors, named class/ID."""
    index = faiss_index.new_index(factory)
    faiss_index.train(index, vectors)
    faiss_index.add(index, vectors)
    ids = np.arange(len(vectors)) if ids is None else ids
    names = [f"class/{i}" for i in ids]
    write_index(folder, index, ids, names, ("fake-32", "f" * 64), factory, ["m"], {}, 0)
    return EmbeddingIndex(folder, "cpu")


def literal(vectors: np.ndarray, ids: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines [q,k] by one float64 product and one sort by cosine and id."""
    cosines = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    order = np.stack([np.lexsort((ids, -row)) for row in cosines])[:, :k]
    return ids[order], np.take_along_axis(cosines, order, 1)


ROWS = {
    "one of one": (1, 1, 1, 1e-7),
    "one": (1000, 63, 1, 1e-7),
    "five": (501, 7, 5, 1e-7),
    "all": (37, 5, 37, 1e-7),
    "more queries than a block": (129, 1500, 2, 1e-7),
}


@pytest.mark.parametrize(("count", "queries", "k", "tolerance"), ROWS.values(), ids=ROWS)
def test_a_search_is_exact(tmp_path, count, queries, k, tolerance):
    vectors, ids = unit(0, count), np.random.default_rng(1).permutation(10 * count)[:count]
    asked = unit(2, queries)
    found = make_index(tmp_path, vectors, ids).search(asked, k)
    expected_ids, expected = literal(vectors, ids, asked, k)
    assert np.array_equal(found.ids, expected_ids)
    np.testing.assert_allclose(found.cosines, expected, atol=tolerance)
    assert (found.ids.dtype, found.cosines.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize(("copies", "k"), [(2, 1), (5, 3), (60, 1), (200, 10)])
def test_ties_go_to_the_smallest_id(tmp_path, copies, k):
    vectors = unit(0, 500)
    where = np.random.default_rng(3).choice(500, copies, replace=False)
    vectors[where] = vectors[0] = unit(4, 1)
    ids = np.random.default_rng(1).permutation(5000)[:500]
    equal = np.sort(ids[np.union1d(where, [0])])
    found = make_index(tmp_path, vectors, ids).search(np.concatenate([vectors[:1], unit(5, 2)]), k)
    assert found.ids[0].tolist() == equal[:k].tolist() + found.ids[0, len(equal[:k]) :].tolist()
    np.testing.assert_allclose(found.cosines[0, : min(k, len(equal))], 1, atol=1e-6)


def test_names_and_vectors_are_found_by_id(tmp_path):
    vectors, ids = unit(0, 20), np.arange(20)[::-1] * 7
    index = make_index(tmp_path, vectors, ids)
    assert np.array_equal(index.vectors(np.array([133, 0, 7])), vectors[[0, 19, 18]])
    assert index.name(14) == "class/14"
    assert index.contains(np.array([0, 1, 133, 140])).tolist() == [True, False, True, False]
    for call in (lambda: index.name(1), lambda: index.vectors(np.array([0, 999]))):
        with pytest.raises(UsageError, match="1 that are not there, the first"):
            call()


def test_an_index_is_mapped_not_read(tmp_path):
    index = make_index(tmp_path, unit(0, 300))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list a process's maps")
    assert str(tmp_path / index.header.vectors_file) in maps.read_text()


WRONG_QUERIES = {
    "dimensions": (np.ones((2, 511)), 1, r"queries as \[Q,512\]"),
    "one vector": (unit(0, 1)[0], 1, r"queries as \[Q,512\]"),
    "length": (unit(0, 2) * 2, 1, "of length 1"),
    "not finite": (np.full((1, 512), np.nan), 1, "of length 1"),
    "k of 0": (unit(0, 2), 0, "k from 1 to the index's 9"),
    "k above count": (unit(0, 2), 10, "k from 1 to the index's 9"),
}


@pytest.mark.parametrize(("queries", "k", "text"), WRONG_QUERIES.values(), ids=WRONG_QUERIES)
def test_wrong_queries_are_refused(tmp_path, queries, k, text):
    with pytest.raises(UsageError, match=text):
        make_index(tmp_path, unit(0, 9)).search(queries, k)


@pytest.mark.parametrize("factory", ["HNSW16", "IVF8,Flat"])
def test_an_approximate_index_knows_its_recall_and_gives_true_cosines(tmp_path, factory):
    vectors = unit(0, 1000)
    index = make_index(tmp_path, vectors, factory=factory)
    assert 0.95 <= index.header.recall <= 1
    assert index.header.effort >= 1
    asked = vectors[:200] + 0.3 * unit(6, 200)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    found = index.search(asked, 3)
    truth, cosines = literal(vectors, np.arange(1000), asked, 3)
    assert (found.ids[:, 0] == truth[:, 0]).mean() > 0.95
    same = found.ids == truth
    np.testing.assert_allclose(found.cosines[same], cosines[same], atol=1e-6)
    again = make_index(tmp_path / "again", vectors, factory=factory)
    name = index.header.vectors_file
    assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert again.header == index.header


def test_places_that_an_approximate_search_leaves_open_are_marked(tmp_path):
    index = make_index(tmp_path, unit(0, 40), factory="IVF8,Flat")
    faiss_index.set_effort(index._index, 1)
    found = index.search(unit(1, 4), 40)
    assert (found.ids[:, -1] == -1).all()
    assert np.isneginf(found.cosines[:, -1]).all()
    assert (found.ids[:, 0] >= 0).all()


@pytest.mark.parametrize(
    ("factory", "text"),
    [("fast", "faiss cannot read"), ("SQ8", "whole vectors"), ("IVF4,PQ16", "whole vectors"), ("PCA8,Flat", "whole")],
)
def test_factories_that_lose_vectors_are_refused(factory, text):
    with pytest.raises(UsageError, match=text):
        faiss_index.new_index(factory)


def test_too_few_images_for_the_cells_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 64 images for 64 cells, got 23"):
        build_index(toy_set(), FakeEmbedder(), tmp_path / "new", factory="IVF64,Flat")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="at least 64 images for 64 cells, got 5"):
        faiss_index.train(faiss_index.new_index("IVF64,Flat"), unit(0, 5))


def toy_set(count: int = 23, seed: int = 0) -> ArraySource:
    return ArraySource(random_images(count, 16, seed), np.arange(count) % 3)


@pytest.mark.parametrize(("batch_size", "workers"), [(None, 0), (1, 0), (7, 2), (100, 0)])
def test_an_index_holds_every_image_of_the_set(tmp_path, batch_size, workers):
    source = toy_set()
    plans, steps = [], []
    reporter = Reporter(planned=plans.append, advance=steps.append)
    result = build_index(source, FakeEmbedder(), tmp_path, batch_size=batch_size, workers=workers, reporter=reporter)
    index = EmbeddingIndex(tmp_path, "cpu")
    index.check_embedder(FakeEmbedder())
    manifest = Manifest.build(source)
    assert np.array_equal(index.ids, manifest.ids)
    assert [index.name(i) for i in source.ids] == [source.name(i) for i in source.ids]
    expected = embed(FakeEmbedder(), [source.read(i) for i in range(23)])
    np.testing.assert_allclose(index.vectors(source.ids), expected, atol=1e-6)
    assert index.search(expected).ids[:, 0].tolist() == source.ids.tolist()
    assert (plans[0].images, plans[0].known, sum(steps), result.embedded) == (23, 0, 23, 23)
    assert (plans[0].seconds is not None) == (batch_size in (None, 1))
    assert result.header.manifests == (manifest.hash,)
    assert set(folder_bytes(tmp_path)) == {"images-23.parquet", "index.json", "vectors-23.faiss"}


def write_numbers(folder: Path, numbers: range) -> None:
    """An image folder of 3 classes, in which a number always has the same name and picture."""
    images = np.concatenate([random_images(1, 16, seed=i) for i in numbers])
    write_folder(folder, images, classes=3, first=numbers.start)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,Flat"])
def test_a_set_that_has_grown_is_embedded_only_where_it_is_new(tmp_path, factory):
    write_numbers(tmp_path / "data", range(10))
    build_index(FolderSource(tmp_path / "data"), FakeEmbedder(), tmp_path / "index", factory=factory)
    write_numbers(tmp_path / "data", range(10, 31))
    grown, embedder = FolderSource(tmp_path / "data"), FakeEmbedder()
    result = build_index(grown, embedder, tmp_path / "index", resume=True, batch_size=100)
    assert (embedder.seen, result.embedded, result.header.count) == (21, 21, 31)
    assert result.header.factory == factory
    assert len(result.header.manifests) == 2
    index = EmbeddingIndex(tmp_path / "index", "cpu")
    fresh = build_index(grown, FakeEmbedder(), tmp_path / "fresh")
    assert set(index.ids) == set(grown.ids)
    assert np.array_equal(index.vectors(grown.ids), EmbeddingIndex(fresh.path, "cpu").vectors(grown.ids))
    assert [index.name(i) for i in grown.ids] == grown.names.tolist()
    names = set(folder_bytes(tmp_path / "index"))
    assert names == {"images-31.parquet", "index.json", "vectors-31.faiss"}
    nothing_new = build_index(grown, FakeEmbedder(), tmp_path / "index", resume=True)
    assert (nothing_new.embedded, nothing_new.header) == (0, result.header)


def test_broken_files_are_counted_named_and_taken_later_when_they_are_mended(tmp_path):
    write_numbers(tmp_path / "data", range(8))
    whole = (tmp_path / "data" / "class-0" / "00.png").read_bytes()
    broken = tmp_path / "data" / "class-1" / "broken.png"
    broken.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "class-2" / "notes.txt").write_text("not an image")
    header = build_index(FolderSource(tmp_path / "data"), FakeEmbedder(), tmp_path / "index").header
    assert header.count == 8
    assert [s["name"] for s in header.skipped] == ["class-1/broken.png", "class-2/notes.txt"]
    assert all(s["reason"] for s in header.skipped)
    broken.write_bytes(whole)
    header = build_index(FolderSource(tmp_path / "data"), FakeEmbedder(), tmp_path / "index", resume=True).header
    assert (header.count, [s["name"] for s in header.skipped]) == (9, ["class-2/notes.txt"])


def test_nothing_but_broken_files_is_an_error_that_can_be_mended(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"")
    with pytest.raises(InputFileError, match="got 1 that cannot, the first a/1.png"):
        build_index(FolderSource(tmp_path / "data"), FakeEmbedder(), tmp_path / "index")
    write_numbers(tmp_path / "data", range(1))
    (tmp_path / "data" / "a" / "1.png").write_bytes((tmp_path / "data" / "class-0" / "00.png").read_bytes())
    assert build_index(FolderSource(tmp_path / "data"), FakeEmbedder(), tmp_path / "index").header.count == 2


def test_without_a_folder_a_set_has_its_own_and_is_embedded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    embedder = FakeEmbedder()
    first = build_index(toy_set(), embedder)
    assert first.path == default_index_folder(Manifest.build(toy_set()), embedder)
    assert (first.path.parent, embedder.seen) == (tmp_path / "indexes", 23 + 4)
    assert build_index(toy_set(), embedder).path == first.path
    assert embedder.seen == 27
    assert build_index(toy_set(), FakeEmbedder("fake-other-32")).path != first.path


REFUSED = {
    "resume is off": ({}, {}, "holds one: continue or extend it with --resume"),
    "embedder": ({"name": "other-32"}, {"resume": True}, r"vectors of other-32 \(f{12}\) .* got those of fake-32"),
    "factory": ({}, {"resume": True, "factory": "HNSW16"}, "expected --factory Flat"),
    "batch size": ({}, {"batch_size": 0}, "batch size of at least 1"),
    "place": ({}, {"out": f"{__file__}/index"}, "can be written"),
}


@pytest.mark.parametrize(("embedder", "change", "text"), REFUSED.values(), ids=REFUSED)
def test_an_index_is_not_overwritten_or_mixed(tmp_path, embedder, change, text):
    build_index(toy_set(), FakeEmbedder(), tmp_path)
    before = folder_bytes(tmp_path)
    with pytest.raises(UsageError, match=text):
        build_index(toy_set(30), FakeEmbedder(**embedder), **{"out": tmp_path} | change)
    assert folder_bytes(tmp_path) == before


def test_another_model_of_the_same_name_is_refused(tmp_path):
    build_index(toy_set(), FakeEmbedder(), tmp_path)
    other = FakeEmbedder()
    other.digest = "0" * 64
    with pytest.raises(UsageError, match="different embedders cannot be compared"):
        EmbeddingIndex(tmp_path, "cpu").check_embedder(other)


def index_until(data: Path, out: Path, advances: int | None = None, number: int = 0, **settings: object) -> int:
    """Exit code of a process that makes an index, saves after every second batch, and sends itself a signal.

    The signal with this number comes when this many steps have been told; without a number of steps, none comes.
    """

    def work(rank: int) -> None:
        told: list[int] = []

        def advance(images: int) -> None:
            told.append(images)
            if len(told) == advances:
                os.kill(os.getpid(), number)

        embedder = FakeEmbedder()
        build_index(FolderSource(data), embedder, out, workers=0, reporter=Reporter(advance=advance), **settings)
        assert embedder.seen < 30

    (code,) = run_ranks(1, work)
    return code


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pending, "SAVE_IMAGES", 6)
    # a graph is what could most easily differ
    factory = "HNSW16"
    data, out = tmp_path / "data", tmp_path / "parts"
    write_numbers(data, range(40))
    (data / "class-1" / "05.png").write_bytes(b"broken")
    (data / "class-2" / "38.png").write_bytes(b"")
    whole = build_index(FolderSource(data), FakeEmbedder(), tmp_path / "whole", factory=factory).path
    stops = ((False, 5, signal.SIGKILL, -signal.SIGKILL), (True, 2, signal.SIGINT, 130))
    for resume, advances, number, code in stops:
        assert index_until(data, out, advances, number, factory=factory, resume=resume) == code
        assert list((out / "pending").glob("*.safetensors"))
        assert not (out / "index.json").exists()
    assert index_until(data, out, factory=factory, resume=True) == 0
    assert folder_bytes(out) == folder_bytes(whole)


@pytest.mark.parametrize("stop", ["write_json", "remove_leftovers"])
def test_a_run_that_ends_while_it_writes_the_index_resumes_to_the_same_bytes(tmp_path, monkeypatch, stop):
    """The two places between the files: before index.json names them, and before the old ones are removed."""
    sources = (toy_set(11), toy_set(23))

    def build(folder: Path) -> None:
        for source in sources:
            build_index(source, FakeEmbedder(), folder, resume=True)

    build(tmp_path / "whole")
    build_index(sources[0], FakeEmbedder(), tmp_path / "parts")

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_files, stop, fail)
        with pytest.raises(KeyboardInterrupt):
            build_index(sources[1], FakeEmbedder(), tmp_path / "parts", resume=True)
    assert len(EmbeddingIndex(tmp_path / "parts", "cpu")) == (11 if stop == "write_json" else 23)
    embedder = FakeEmbedder()
    build_index(sources[1], embedder, tmp_path / "parts", resume=True)
    assert embedder.seen == 0
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "whole")


def test_pending_files_that_are_left_over_are_not_written_over(tmp_path, monkeypatch):
    """An index was finished and its pending files not removed; one of them names only a broken file."""
    write_numbers(tmp_path / "data", range(3))
    build_index(FolderSource(tmp_path / "data"), FakeEmbedder(), tmp_path / "index")
    write_numbers(tmp_path / "data", range(3, 20))
    broken = "class-0/18.png"
    (tmp_path / "data" / broken).write_bytes(b"")
    grown = FolderSource(tmp_path / "data")
    header = {"embedder": "fake-32", "digest": "f" * 64, "names": [], "skipped": [{"name": broken, "reason": "empty"}]}
    header["skipped_ids"] = grown.ids[grown.names == broken].tolist()
    tensors = {"ids": torch.empty(0, dtype=torch.int64), "vectors": torch.empty(0, 512)}
    write_tensors(tmp_path / "index" / "pending" / "000001.safetensors", tensors, pending.PENDING_SCHEMA, header)
    known = EmbeddingIndex(tmp_path / "index", "cpu")
    header |= {"names": known.names.to_pylist(), "skipped": [], "skipped_ids": []}
    tensors = {"ids": torch.tensor(known.ids), "vectors": torch.from_numpy(known.vectors(known.ids))}
    write_tensors(tmp_path / "index" / "pending" / "000000.safetensors", tensors, pending.PENDING_SCHEMA, header)
    monkeypatch.setattr(pending, "SAVE_IMAGES", 3)
    result = build_index(grown, FakeEmbedder(), tmp_path / "index", resume=True)
    assert (result.header.count, [s["name"] for s in result.header.skipped]) == (19, [broken])
    assert len(EmbeddingIndex(tmp_path / "index", "cpu").ids) == 19


def test_an_interrupted_run_keeps_its_factory_and_embedder(tmp_path, monkeypatch):
    def stop(images: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_index(toy_set(), FakeEmbedder(), tmp_path, factory="HNSW16", reporter=Reporter(advance=stop))
    with pytest.raises(UsageError, match="--resume"):
        build_index(toy_set(), FakeEmbedder(), tmp_path)
    with pytest.raises(UsageError, match="got those of fake-32: resume with the same embedder"):
        build_index(toy_set(), FakeEmbedder("other-32"), tmp_path, resume=True)
    assert build_index(toy_set(), FakeEmbedder(), tmp_path, resume=True).header.factory == "HNSW16"


def test_a_damaged_pending_file_is_refused(tmp_path):
    path = tmp_path / "000000.safetensors"
    header = {"embedder": "fake-32", "digest": "f" * 64, "names": ["a/b"], "skipped": [], "skipped_ids": []}
    tensors = {"ids": torch.tensor([1]), "vectors": torch.eye(1, 512)}
    for change, dropped in (({"vectors": torch.ones(1, 511)}, ""), ({}, "names"), ({"ids": torch.ones(1)}, "")):
        write_tensors(path, tensors | change, pending.PENDING_SCHEMA, {k: v for k, v in header.items() if k != dropped})
        with pytest.raises(InputFileError, match="remove that file and resume"):
            pending.read_pending(path, FakeEmbedder())
    write_tensors(path, tensors, pending.PENDING_SCHEMA, header)
    assert pending.read_pending(path, FakeEmbedder())[0].tolist() == [1]


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,Flat"])
def test_merged_indexes_find_what_their_parts_find(tmp_path, factory):
    vectors, ids = unit(0, 50), np.arange(50) * 3
    parts = [
        make_index(tmp_path / "a", vectors[:20], ids[:20]),
        make_index(tmp_path / "b", vectors[15:40], ids[15:40], "HNSW16"),
        make_index(tmp_path / "c", vectors[40:], ids[40:], "IVF2,Flat"),
    ]
    broken = [{"name": name, "reason": "empty"} for name in ("class/60", "class/61")]
    changed(tmp_path / "a" / "index.json", skipped=broken)
    header = merge_indexes([part.path for part in parts], tmp_path / "merged", factory)
    assert [s["name"] for s in header.skipped] == ["class/61"]
    merged = EmbeddingIndex(tmp_path / "merged", "cpu")
    assert (header.count, header.factory, merged.ids.tolist()) == (50, factory, ids.tolist())
    assert merged.name(60) == "class/60"
    assert np.array_equal(merged.vectors(ids), vectors)
    if factory == "Flat":
        assert np.array_equal(merged.search(unit(1, 9), 4).ids, literal(vectors, ids, unit(1, 9), 4)[0])


def test_indexes_that_do_not_fit_are_not_merged(tmp_path):
    vectors = unit(0, 9)
    first, second = (make_index(tmp_path / name, vectors).path for name in "ab")
    cases = [
        ([first], tmp_path / "new", "at least two indexes"),
        ([first, second], first, "which is not empty"),
    ]
    make_index(tmp_path / "c", vectors[::-1].copy())
    cases.append(([first, tmp_path / "c"], tmp_path / "new", "got two for class/0"))
    document = json.loads((second / "index.json").read_text())
    write_json(second / "index.json", document | {"embedder": "other-32"})
    cases.append(([first, second], tmp_path / "new", "different embedders cannot be compared"))
    for paths, out, text in cases:
        with pytest.raises(UsageError, match=text):
            merge_indexes(paths, out)
    assert not (tmp_path / "new").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def patched(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


def changed(path: Path, **change: object) -> None:
    document = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def other_images(path: Path, ids: list[int], names: str = "name") -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": pyarrow.array(ids), names: [str(i) for i in ids]}), path)


VECTORS, IMAGES, HEADER = "vectors-9.faiss", "images-9.parquet", "index.json"
DAMAGES = {
    "no vectors": (VECTORS, Path.unlink, "got No such file"),
    "truncated vectors": (VECTORS, cut, "bytes instead of"),
    "empty vectors": (VECTORS, lambda p: p.write_bytes(b""), "0 bytes instead of"),
    "more vectors than the header": (VECTORS, lambda p: patched(p, 8, struct.pack("<q", 10)), "10 vectors of 512"),
    "a huge count": (VECTORS, lambda p: patched(p, 8, struct.pack("<q", 2**60)), "vectors of 512"),
    "other dimensions": (VECTORS, lambda p: patched(p, 4, struct.pack("<i", 256)), "9 vectors of 256"),
    "another kind": (VECTORS, lambda p: patched(p, 0, b"IxPT"), "in b'IxPT'"),
    "a huge size inside": (VECTORS, lambda p: patched(p, 37, struct.pack("<q", 2**60)), "make the index again"),
    "a distance instead": (VECTORS, lambda p: patched(p, 33, struct.pack("<i", 1)), "make the index again"),
    "no images": (IMAGES, Path.unlink, "got no file"),
    "a vector of another index": (VECTORS, lambda p: patched(p, 99, b"xy"), "another or a damaged one"),
    "truncated images": (IMAGES, cut, "cannot be used"),
    "fewer images": (IMAGES, lambda p: other_images(p, list(range(8))), "8 rows of 9"),
    "an id twice": (IMAGES, lambda p: other_images(p, [0, *range(8)]), "an id twice"),
    "no names": (IMAGES, lambda p: other_images(p, list(range(9)), "other"), "cannot be used"),
    "no header": (HEADER, Path.unlink, "got none"),
    "damaged header": (HEADER, lambda p: p.write_text("{"), "damaged"),
    "foreign header": (HEADER, lambda p: p.write_text('{"schema": "fastmem.run/1"}'), "got fastmem.run/1"),
    "header lacks a key": (HEADER, lambda p: changed(p, factory=None), "missing required field `factory`"),
    "header of another type": (HEADER, lambda p: changed(p, bytes="many"), r"at `\$.bytes`"),
    "header with odd rows": (HEADER, lambda p: changed(p, skipped=["a"]), r"at `\$.skipped\[0\]`"),
    "header of no images": (HEADER, lambda p: changed(p, count=0), r"at `\$.count`"),
    "header of fewer images": (HEADER, lambda p: changed(p, count=8), "images-8.parquet"),
}


@pytest.mark.parametrize(("name", "damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_refused_before_it_is_trusted(tmp_path, name, damage, text):
    make_index(tmp_path, unit(0, 9))
    damage(tmp_path / name)
    with pytest.raises(InputFileError, match=text):
        EmbeddingIndex(tmp_path, "cpu")


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,Flat"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 3.0], ids=str)
def test_vectors_that_are_not_of_length_1_are_refused(tmp_path, factory, value):
    vectors = unit(0, 50)
    broken = vectors.copy()
    broken[7] *= value
    header = make_index(tmp_path, vectors, factory=factory).header
    with pytest.raises(InputFileError, match=r"of length 1 .* got 1 others"):
        faiss_index.add(faiss_index.new_index("Flat"), broken)
    # an index of an earlier version has no check sums, and its vectors are looked at all the same
    changed(tmp_path / "index.json", vectors_checksum=None)
    content = (tmp_path / header.vectors_file).read_bytes()
    assert content.count(vectors[7].tobytes()) == 1
    (tmp_path / header.vectors_file).write_bytes(content.replace(vectors[7].tobytes(), broken[7].tobytes()))
    with pytest.raises(InputFileError, match=r"of length 1 in .*vectors-50.faiss, got 1 others"):
        EmbeddingIndex(tmp_path, "cpu")


class BrokenEmbedder(FakeEmbedder):
    """An embedder that gives NaN for the image whose vector is ``broken``, and may notice that itself."""

    def __init__(self, broken: np.ndarray, notices: bool) -> None:
        super().__init__()
        self.broken, self.notices = broken, notices

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        vectors = super().__call__(pixels)
        found = np.flatnonzero((vectors == self.broken).all(1))
        if len(found) and self.notices:
            raise UndefinedEmbedding("expected numbers, got none", int(found[0]))
        vectors[found] = np.nan
        return vectors


@pytest.mark.parametrize("notices", [False, True])
def test_an_image_whose_embedding_is_undefined_is_named(tmp_path, notices):
    build_index(toy_set(), FakeEmbedder(), tmp_path / "whole")
    whole = EmbeddingIndex(tmp_path / "whole", "cpu")
    embedder = BrokenEmbedder(whole.vectors(whole.ids[4:5]), notices)
    with pytest.raises(InputFileError, match=f"an embedding of length 1 for {whole.names[4].as_py()}"):
        build_index(toy_set(), embedder, tmp_path / "broken")


def test_files_of_an_index_of_as_many_images_are_told_apart(tmp_path):
    mine, other = make_index(tmp_path / "a", unit(0, 9)), make_index(tmp_path / "b", unit(1, 9))
    assert mine.header.id != other.header.id
    for name in (VECTORS, HEADER):
        folder = shutil.copytree(tmp_path / "a", tmp_path / name)
        shutil.copy(tmp_path / "b" / name, folder / name)
        with pytest.raises(InputFileError, match="another or a damaged one"):
            EmbeddingIndex(folder, "cpu")


def test_a_full_disk_is_one_sentence_and_leaves_the_old_index(tmp_path, monkeypatch):
    make_index(tmp_path, unit(0, 9))
    before = folder_bytes(tmp_path)

    def fail(index: object, path: str) -> None:
        raise RuntimeError("Error in write\nNo space left on device")

    monkeypatch.setattr(faiss_index.faiss, "write_index", fail)
    with pytest.raises(UsageError, match="got No space left on device"):
        make_index(tmp_path, unit(0, 9))
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize(("count", "width"), [(1, 1), (63, 5), (500, 500), (200, 40)])
def test_a_matrix_product_proposes_what_faiss_proposes(tmp_path, monkeypatch, count, width):
    monkeypatch.setattr(nearest, "BLOCK", 64)
    index = make_index(tmp_path, unit(0, count))
    by_torch = nearest.TorchNearest(index._index, torch.device("cpu"))
    queries = unit(1, 33)
    assert by_torch.max_width == count
    assert np.array_equal(np.sort(by_torch(queries, width)), np.sort(index._nearest(queries, width)))


def test_a_gpu_that_faiss_cannot_use_is_searched_by_torch_and_said_aloud(tmp_path, monkeypatch):
    index = make_index(tmp_path, unit(0, 100))
    notes: list[str] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 10**10))
    monkeypatch.setattr(nearest, "gpu_problem", lambda: "faiss 1.0 fails its own search there (status -6)")
    monkeypatch.setattr(nearest, "TorchNearest", lambda index, device: (index, device))
    chosen = nearest.choose_nearest(index._index, torch.device("cuda"), notes.append)
    assert chosen[1].type == "cuda"
    assert notes == ["searching with torch's matrix product on cuda: faiss 1.0 fails its own search there (status -6)"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    assert nearest.choose_nearest(index._index, torch.device("cuda"), notes.append).name == "faiss-cpu"
    assert "which has 1,000 free" in notes[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["faiss", "torch"])
def test_a_gpu_finds_what_the_cpu_finds(tmp_path, monkeypatch, place):
    if place == "faiss" and nearest.gpu_problem() is not None:
        pytest.skip(nearest.gpu_problem())
    if place == "torch":
        monkeypatch.setattr(nearest, "gpu_problem", lambda: "asked for torch")
    vectors = unit(0, 3000)
    vectors[100:130] = vectors[7]
    on_cpu = make_index(tmp_path, vectors)
    on_gpu = EmbeddingIndex(tmp_path, "cuda")
    assert on_gpu.searched_by == ("faiss-gpu" if place == "faiss" else "torch-cuda")
    queries = np.concatenate([unit(1, 1100), vectors[:20]])
    found, expected = on_gpu.search(queries, 5), on_cpu.search(queries, 5)
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.cosines, expected.cosines)


def test_more_rows_than_a_gpu_can_give_come_from_the_cpu(tmp_path):
    vectors = unit(0, 300)
    vectors[:] = vectors[0]
    index = make_index(tmp_path, vectors)
    widths: list[int] = []

    class Narrow:
        name, max_width = "narrow", 20

        def __call__(self, queries: np.ndarray, width: int) -> np.ndarray:
            widths.append(width)
            return np.tile(np.arange(300 - width, 300), (len(queries), 1))

    index._nearest = Narrow()
    assert index.search(vectors[:2]).ids.tolist() == [[0], [0]]
    assert max(widths) <= 20


def test_faiss_says_why_it_cannot_search_on_a_gpu(monkeypatch):
    nearest.gpu_problem.cache_clear()
    monkeypatch.setattr(nearest.faiss, "get_num_gpus", lambda: 0, raising=False)
    assert "finds no GPU" in nearest.gpu_problem()
    nearest.gpu_problem.cache_clear()
    monkeypatch.setattr(nearest.faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(nearest, "_SELF_TEST", "import os; os.abort()")
    assert "fails its own search there (status -6)" in nearest.gpu_problem()
    nearest.gpu_problem.cache_clear()
    monkeypatch.setattr(nearest, "_SELF_TEST", "raise SystemExit(0)")
    assert nearest.gpu_problem() is None
    nearest.gpu_problem.cache_clear()


@pytest.fixture
def fake_model(monkeypatch, tmp_path):
    """The command with a fake embedder, in an empty home."""
    monkeypatch.setattr("fastmem.stages.options.find_embedder", lambda sscd, **options: (FakeEmbedder(), "a fake"))
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTMEM_DATA", raising=False)


def test_the_command_makes_extends_and_merges(capsys, tmp_path, fake_model):
    write_numbers(tmp_path / "data", range(15))
    (tmp_path / "data" / "class-0" / "bad.png").write_bytes(b"")
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "index", "--json")
    code, out, err = run(capsys, "index", *arguments)
    assert code == 0, err
    document = json.loads(out)
    keys = "index images embedder factory bytes seconds images_per_second skipped recall"
    assert set(keys.split()) <= set(document)
    assert (document["images"], document["skipped"], document["embedder"]) == (15, 1, "fake-32")
    assert (document["factory"], document["recall"]) == ("Flat", 1.0)
    assert document["bytes"] == (tmp_path / "index" / "vectors-15.faiss").stat().st_size
    assert "embedding 16 images with fake-32, about 0 MB on disk, about 0 s at the measured speed" in err
    assert run(capsys, "index", *arguments)[0] == 2
    write_numbers(tmp_path / "data", range(15, 20))
    code, out, err = run(capsys, "index", *arguments, "--resume")
    assert (code, json.loads(out)["images"]) == (0, 20)
    assert "embedding 6 images (15 are done)" in err
    write_numbers(tmp_path / "more", range(30, 36))
    assert run(capsys, "index", "--data", tmp_path / "more", "--out", tmp_path / "two", "--factory", "HNSW16")[0] == 0
    merging = ("--merge", tmp_path / "index", "--merge", tmp_path / "two", "--out", tmp_path / "merged")
    code, out, err = run(capsys, "index", *merging)
    assert code == 0, err
    assert "26 images as fake-32, Flat (exact)" in out
    assert "skipped class-0/bad.png" in err
    assert read_header(tmp_path / "merged").count == 26


def test_without_data_the_named_or_the_embedded_images_are_taken(capsys, tmp_path, fake_model, monkeypatch):
    code, out, err = run(capsys, "index", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 823
    write_numbers(tmp_path / "data", range(4))
    monkeypatch.setenv("FASTMEM_DATA", str(tmp_path / "data"))
    assert json.loads(run(capsys, "index", "--json")[1])["images"] == 4


COMMANDS = {
    "no such data": (("--data", "{tmp}/nothing"), 3, "got nothing there"),
    "classes of the embedded images": (("--classes", "{tmp}/names"), 2, "leave it out"),
    "factory": (("--data", "{tmp}/data", "--factory", "fast"), 2, "expected an index factory"),
    "merge of one": (("--merge", "{tmp}/a", "--out", "{tmp}/b"), 2, "at least two"),
    "merge without out": (("--merge", "{tmp}/a", "--merge", "{tmp}/b"), 2, "expected --out INDEX"),
    "merge with data": (("--merge", "{tmp}/a", "--data", "{tmp}/data"), 2, "got --data"),
    "merge of nothing": (("--merge", "{tmp}/a", "--merge", "{tmp}/b", "--out", "{tmp}/c"), 3, "got none"),
}


@pytest.mark.parametrize(("arguments", "code", "text"), COMMANDS.values(), ids=COMMANDS)
def test_wrong_input_ends_with_one_sentence(capsys, tmp_path, fake_model, arguments, code, text):
    write_numbers(tmp_path / "data", range(4))
    found, out, err = run(capsys, "index", *(a.format(tmp=tmp_path) for a in arguments))
    assert (found, out) == (code, "")
    assert text in err.strip().splitlines()[-1]
    assert err.strip().splitlines()[-1].startswith("fastmem: expected")


def test_without_a_model_the_command_says_how_to_get_one(capsys, tmp_path, monkeypatch):
    from fastmem.index import embedding

    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path))
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    code, out, err = run(capsys, "index")
    assert (code, out) == (2, "")
    assert "expected an SSCD model to embed images with, got none: no SSCD model" in err
    assert run(capsys, "index", "--sscd", tmp_path / "no.pt")[0] == 3
