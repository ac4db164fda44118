"""Images in tar and parquet shards: names, ids, classes, what is left out, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from fastmem.data.decoding import DamagedImage, Skipped, decode
from fastmem.data.loading import load_views
from fastmem.data.manifest import Manifest
from fastmem.data.parquet_source import ParquetSource
from fastmem.data.shards import expand
from fastmem.data.sources import FolderSource, image_ids, open_source
from fastmem.data.tar_source import TarSource
from fastmem.data.views import CenterCrop
from fastmem.errors import FastmemError, InputFileError, UsageError
from tests.data.archives import tar_bytes, write_folder, write_parquet, write_tar, write_zip
from tests.data.test_data_sources import ANIMAL_NAMES, ANIMALS, encoded

BOTH = ["dog/1.png", "cat/b.PNG"]


def halves(files: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    return {k: v for k, v in files.items() if k in BOTH}, {k: v for k, v in files.items() if k not in BOTH}


def as_shards(kind: str, place: Path, files: dict[str, bytes] = ANIMALS) -> str:
    """The same images in two shards; the pattern that names them."""
    classes = sorted({name.split("/")[0] for name in files})
    for number, part in enumerate(halves(files)):
        if kind == "tar":
            write_tar(place / f"{number:03d}.tar", part)
        else:
            write_parquet(place / f"{number:03d}.parquet", part, classes, rows_per_group=1)
    return f"{place}/{{000..001}}.{kind}"


kinds = pytest.mark.parametrize("kind", ["tar", "parquet"])


@kinds
@pytest.mark.parametrize("written", ["braces", "wildcard", "list", "text", "folder", "data folder", "file://"])
def test_shards_are_found_however_they_are_named(kind: str, written: str, tmp_path: Path, tmp_path_factory) -> None:
    place = tmp_path / "data" if written == "data folder" else tmp_path
    pattern = as_shards(kind, place)
    paths = [f"{place}/000.{kind}", f"{place}/001.{kind}"]
    given = {
        "braces": pattern,
        "wildcard": f"{place}/*.{kind}",
        "list": paths,
        "text": "::".join(paths),
        "folder": place,
        "data folder": tmp_path,
        "file://": f"file://{pattern}",
    }[written]
    source = open_source(given)
    folder = FolderSource(write_folder(tmp_path_factory.mktemp("images"), ANIMALS))
    assert list(source.names) == ANIMAL_NAMES
    assert np.array_equal(source.ids, folder.ids)
    assert (source.classes, source.labels.tolist()) == (folder.classes, folder.labels.tolist())
    for index in range(4):
        assert source.read(index) == folder.read(index)
        assert source.digest(index) == folder.digest(index)
    again = open_source(source.place, source.split)
    assert (again.place, again.description) == (source.place, source.description)
    assert np.array_equal(again.ids, source.ids)


@kinds
def test_shards_lie_in_a_remote_file_system(kind: str, tmp_path: Path) -> None:
    pattern = as_shards(kind, tmp_path)
    memory = fsspec.filesystem("memory")
    for path in expand(pattern):
        memory.pipe(f"/{kind}/{Path(path).name}", Path(path).read_bytes())
    for written in (f"memory://{kind}/{{000..001}}.{kind}", f"memory://{kind}/*.{kind}"):
        source = open_source(written)
        assert list(source.names) == ANIMAL_NAMES
        assert source.read(1) == decode(io.BytesIO(ANIMALS["cat/b.PNG"]))
        assert source.place == written
    memory.pipe(f"/{kind}/000.{kind}", b"short")
    with pytest.raises(InputFileError, match="as it was listed|cannot be read|whole"):
        pickle.loads(pickle.dumps(source)).read(1)
    memory.rm(f"/{kind}", recursive=True)
    with pytest.raises(InputFileError, match="nothing there"):
        pickle.loads(pickle.dumps(source)).read(1)


@pytest.mark.parametrize(
    ("pattern", "error", "match"),
    [
        pytest.param("no-{0..3}.tar", InputFileError, "no-0.tar, got nothing there", id="a missing shard"),
        pytest.param("no-*.tar", InputFileError, "that match .*, got none", id="no match"),
        pytest.param("a.tar::a.tar", UsageError, "every shard once", id="twice"),
        pytest.param("a-{0..9999999}.tar", UsageError, "at most 1,000,000", id="too many"),
        pytest.param("nowhere://a.tar", UsageError, "Protocol not known", id="an unknown protocol"),
        pytest.param("::", UsageError, "pattern of shards", id="nothing"),
        pytest.param("a.tar", InputFileError, "nothing there", id="one that is missing"),
    ],
)
def test_patterns_that_name_nothing_are_refused(
    pattern: str, error: type[FastmemError], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        open_source(pattern)


def test_braces_and_brackets_in_the_name_of_a_file_are_part_of_it(tmp_path: Path) -> None:
    odd = write_tar(tmp_path / "a{0..1}[x]*.tar", ANIMALS)
    assert list(open_source(odd).names) == ANIMAL_NAMES
    assert expand("s3://b/{a,b}-{8..10}.tar") == [f"s3://b/{x}-{n}.tar" for x in "ab" for n in (8, 9, 10)]
    assert expand("s3://b/{08..10}.tar") == [f"s3://b/{n}.tar" for n in ("08", "09", "10")]
    assert expand("s3://b/{name}.tar") == ["s3://b/{name}.tar"]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_read_in_every_format(tar_format: int, tmp_path: Path) -> None:
    names = ["cat/" + "x" * 90 + "/" + "y" * 80 + ".png", "./cat/1.png", "dog/a\nb c.png"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["dog/猫.png", "dog/" + "z" * 300 + ".png"]
    source = TarSource(write_tar(tmp_path / "a.tar", {name: encoded(7) for name in names}, tar_format))
    assert sorted(source.names) == sorted(name.removeprefix("./") for name in names)
    assert np.array_equal(source.ids, image_ids(source.names))
    assert all(source.read(i).size == (6, 5) for i in range(len(source)))


LABELS = {
    "numbers": (".cls", b"1", b"0", ("0", "1")),
    "names": (".cls", b"dog\n", b"cat", ("cat", "dog")),
    "json number": (".json", b'{"label": 1, "class_name": "x"}', b'{"label": 0}', ("0", "1")),
    "json name": (".json", b'{"class_name": "dog"}', b'{"class": "cat"}', ("cat", "dog")),
}


@pytest.mark.parametrize(("ending", "dog", "cat", "classes"), LABELS.values(), ids=LABELS)
def test_labels_beside_images_name_their_classes(
    ending: str, dog: bytes, cat: bytes, classes: tuple[str, ...], tmp_path: Path
) -> None:
    files = {
        "x.jpg": encoded(1, file_format="JPEG"),
        f"x{ending}": dog,
        f"y{ending}": cat,
        "y.png": encoded(2),
        "z.png": encoded(3),
        "y.txt": b"a caption",
        "y.seg.png": encoded(4),
    }
    source = TarSource(write_tar(tmp_path / "a.tar", files))
    assert source.classes == classes
    assert list(source.names) == [f"{classes[0]}/y.png", f"{classes[1]}/x.jpg"]
    assert source.labels.tolist() == [0, 1]
    assert source.skipped == [
        Skipped("y.seg.png", "no label beside it"),
        Skipped("y.txt", "not an image file (.txt extension)"),
        Skipped("z.png", "no label beside it"),
    ]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (None, ["0/y.png", "2/x.png"]),
        (["a", "b", "c"], ["a/y.png", "c/x.png"]),
        (["2", "1", "0"], ["2/x.png", "0/y.png"]),
    ],
    ids=["own", "by position", "by name"],
)
def test_a_class_order_names_numbers_by_position_unless_it_has_them(
    classes: list[str] | None, names: list[str], tmp_path: Path
) -> None:
    files = {"x.png": encoded(1), "x.cls": b"2", "y.png": encoded(2), "y.cls": b"0"}
    source = TarSource(write_tar(tmp_path / "a.tar", files), classes=classes)
    assert list(source.names) == names
    assert source.classes == tuple(classes or ["0", "1", "2"])
    again = TarSource(tmp_path / "a.tar", classes=source.classes)
    assert np.array_equal(again.ids, source.ids)
    assert np.array_equal(again.labels, source.labels)


@pytest.mark.parametrize(
    ("files", "classes", "match"),
    [
        pytest.param({"x.cls": b"2", "y.cls": b"cat"}, None, "all numbers or all names", id="both"),
        pytest.param({"x.cls": b"2", "y.cls": b"0"}, ["a", "b"], "by their numbers, got 2 names", id="too few names"),
        pytest.param({"x.cls": b"2", "y.cls": b"0"}, ["2", "b", "c"], "every class of", id="some of the names"),
        pytest.param({"x.cls": b"1000000", "y.cls": b"0"}, None, "labels below 1000000", id="a huge label"),
        pytest.param({"x.cls": b"-1", "y.cls": b"-1"}, None, "no class folder", id="no labels"),
        pytest.param({}, None, "got 2 images that lie in no class folder", id="neither labels nor folders"),
    ],
)
def test_labels_that_cannot_be_are_refused(
    files: dict[str, bytes], classes: list[str] | None, match: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", {"x.png": encoded(1), "y.png": encoded(2)} | files)
    with pytest.raises(UsageError, match=match):
        TarSource(path, classes=classes)


def test_odd_members_of_a_tar_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmem.data.tar_source.MAX_ENTRY_BYTES", 4000)
    path = tmp_path / "a.tar"
    odd = {"/cat/0.png": b"x", "../cat/0.png": b"x", "cat/../../0.png": b"x", "cat/big.png": bytes(4001)}
    with tarfile.open(path, "w") as archive:
        for name, content in (ANIMALS | odd | {"cat/._1.png": b"x", "__MACOSX/cat/1.png": b"x"}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"cat/{name}.png")
            member.type, member.linkname = kind, "a.jpeg"
            archive.addfile(member)
    source = TarSource(path)
    assert list(source.names) == ANIMAL_NAMES
    outside = "its path leads out of the archive"
    assert source.skipped == [
        Skipped("../cat/0.png", outside),
        Skipped("/cat/0.png", outside),
        Skipped("cat/../../0.png", outside),
        Skipped("cat/big.png", "huge: 4001 bytes, the limit is 4000"),
        Skipped("cat/hard.png", "a link"),
        Skipped("cat/link.png", "a link"),
        Skipped("cat/pipe.png", "not a regular file"),
    ]


def test_of_a_name_twice_in_a_tar_the_last_counts_and_in_two_it_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for shade in (1, 2):
            member = tarfile.TarInfo("cat/a.png")
            member.size = len(encoded(shade))
            archive.addfile(member, io.BytesIO(encoded(shade)))
    source = TarSource(tmp_path / "a.tar")
    assert source.skipped == [Skipped("cat/a.png", "the archive holds a later file of the same name")]
    assert source.read(0) == decode(io.BytesIO(encoded(2)))
    write_tar(tmp_path / "b.tar", {"cat/a.png": encoded(3)})
    with pytest.raises(UsageError, match=r"every image once, got 'cat/a.png' in both .*a.tar and .*b.tar"):
        TarSource(f"{tmp_path}/*.tar")


WHOLE = tar_bytes(ANIMALS)
START = WHOLE.index(b"cat/b.PNG")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(b"", "got something else", id="empty"),
        pytest.param(b"hello" * 300, "got something else", id="not a tar"),
        pytest.param(gzip.compress(WHOLE), "got gzip: unpack it with gzip -d", id="gzip"),
        pytest.param(b"\x28\xb5\x2f\xfd" + bytes(600), "got zstd", id="zstd"),
        pytest.param(WHOLE[: START + 700], "without its end|ends within", id="cut off within a member"),
        pytest.param(WHOLE[: START + 100], "without its end", id="cut off within a header"),
        pytest.param(WHOLE[:START], "without its end", id="cut off between members"),
        pytest.param(WHOLE[:START] + b"C" + WHOLE[START + 1 :], "a damaged header", id="a changed name"),
        pytest.param(WHOLE[: START + 124] + b"9" * 11 + WHOLE[START + 135 :], "damaged", id="a size that is none"),
        pytest.param(WHOLE + WHOLE, "got more behind it", id="two archives joined"),
    ],
)
def test_tar_files_that_are_not_whole_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputFileError, match=match):
        open_source(tmp_path / "a.tar")


@kinds
def test_a_shard_that_was_exchanged_is_not_read(kind: str, tmp_path: Path) -> None:
    source = open_source(as_shards(kind, tmp_path))
    path = tmp_path / f"000.{kind}"
    size = path.stat().st_size
    path.write_bytes(b"x" * size)
    fresh = pickle.loads(pickle.dumps(source))
    with pytest.raises(FastmemError, match="not in the tar any more|cannot be read"):
        fresh.read(1)
    path.write_bytes(b"x" * (size + 1))
    with pytest.raises(InputFileError, match="as it was listed"):
        pickle.loads(pickle.dumps(source)).read(1)
    path.unlink()
    with pytest.raises(InputFileError, match="nothing there"):
        pickle.loads(pickle.dumps(source)).read(1)


@kinds
def test_images_are_read_in_stored_order_and_in_workers(kind: str, tmp_path: Path) -> None:
    source = open_source(as_shards(kind, tmp_path))
    manifest = Manifest.build(source)
    seen: list[int] = []
    contents = source._contents
    source._contents = lambda indexes: contents([seen.append(i) or i for i in indexes])
    source.prepare([0, 1, 2, 3])
    places = [source._stored_at(i) for i in seen]
    assert places == sorted(places)
    del source._contents
    batches = [np.arange(2), np.arange(2, 4)]
    found = [list(load_views(source, manifest, batches, CenterCrop(4), workers)) for workers in (0, 2)]
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.views, other.views)
        assert np.array_equal(one.positions, other.positions)


@kinds
def test_a_damaged_image_in_a_shard_is_named(kind: str, tmp_path: Path) -> None:
    source = open_source(as_shards(kind, tmp_path, ANIMALS | {"cat/b.PNG": b"hello"}))
    source.prepare(range(4))
    for _ in range(2):
        with pytest.raises(DamagedImage, match="cat/b.PNG: not an image that can be read"):
            source.read(1)
    assert source.read(0).size == (6, 5)


def test_parquet_names_rows_where_no_path_is_stored(tmp_path: Path) -> None:
    images = [encoded(1), None, encoded(2), encoded(3)]
    labels = pyarrow.array([1, 0, None, 0])
    parquet.write_table(pyarrow.table({"jpg": images, "cls": labels, "t": ["a"] * 4}), tmp_path / "a-1.parquet")
    source = ParquetSource(tmp_path / "a-1.parquet")
    assert list(source.names) == ["0/a-1/00000001", "0/a-1/00000003", "1/a-1/00000000"]
    assert source.skipped == [Skipped("a-1/00000002", "no label")]
    assert source.read(1) == decode(io.BytesIO(encoded(3)))
    with pytest.raises(DamagedImage, match="no content is stored"):
        source.read(0)


def test_parquet_keeps_the_order_of_its_class_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ANIMALS, classes=["dog", "bird", "cat"])
    source = ParquetSource(path)
    assert (source.classes, source.labels.tolist()) == (("dog", "bird", "cat"), [0, 2, 2, 2])
    assert ParquetSource(path, classes=["cat", "dog"]).labels.tolist() == [0, 0, 0, 1]
    # names that the file does not have stand for its numbers
    assert ParquetSource(path, classes=["n1", "n2", "n3"]).names[0] == "n1/1.png"
    for wrong in (["n1", "n2"], ["dog", "n2", "n3"]):
        with pytest.raises(UsageError, match="class order|by their numbers"):
            ParquetSource(path, classes=wrong)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        pytest.param({"image": [b"x"]}, "one column of labels .* got 0", id="no label"),
        pytest.param({"label": [1]}, "one column of images .* got 0", id="no image"),
        pytest.param({"a": [b"x"], "b": [b"x"], "label": [1]}, "one column of images .* got 2", id="two images"),
    ],
)
def test_parquet_without_the_columns_is_refused(columns: dict[str, list], match: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=match):
        open_source(tmp_path / "a.parquet")


def test_parquet_shards_must_be_alike(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", ANIMALS)
    write_parquet(tmp_path / "1.parquet", {"cow/1.png": encoded(9)})
    with pytest.raises(UsageError, match="columns and class names of .*0.parquet in every shard"):
        open_source(f"{tmp_path}/*.parquet")
    (tmp_path / "2.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputFileError, match="whole parquet file at .*2.parquet"):
        open_source(tmp_path / "2.parquet")


def test_a_folder_of_shards_is_read_by_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ANIMALS)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", {"cat/v.png": encoded(9)}, ["cat", "dog"])
    assert list(open_source(tmp_path).names) == ANIMAL_NAMES
    assert list(open_source(tmp_path, "validation").names) == ["cat/v.png"]
    assert open_source(tmp_path, "validation").split == "validation"
    assert len(open_source(tmp_path, "")) == 5
    with pytest.raises(UsageError, match="split 'test'"):
        open_source(tmp_path, "test")
    write_tar(tmp_path / "data" / "train-0.tar", ANIMALS)
    with pytest.raises(UsageError, match="both tar and parquet"):
        open_source(tmp_path)


def test_files_are_taken_for_what_they_contain(tmp_path: Path) -> None:
    write_tar(tmp_path / "images", ANIMALS)
    write_parquet(tmp_path / "rows", ANIMALS)
    write_zip(tmp_path / "zipped", ANIMALS)
    for name, kind in (("images", "TarSource"), ("rows", "ParquetSource"), ("zipped", "ZipSource")):
        assert type(open_source(tmp_path / name)).__name__ == kind


def _names_in(source: TarSource) -> list[str]:
    return [source.name(int(source.ids[0])), str(source.read(0).size)]


def test_a_source_of_shards_can_be_sent_to_a_fresh_process(tmp_path: Path) -> None:
    source = open_source(as_shards("tar", tmp_path))
    source.prepare([0])
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(_names_in, (source,)) == ["cat/a.jpeg", "(6, 5)"]


def test_metadata_that_is_no_metadata_is_passed_over(tmp_path: Path) -> None:
    for number, text in enumerate(("[]", "nonsense", json.dumps({"info": {"features": [1]}}), "[" * 10**5)):
        table = pyarrow.table({"image": [encoded(1)], "label": [number]})
        parquet.write_table(table.replace_schema_metadata({"huggingface": text}), tmp_path / "a.parquet")
        assert open_source(tmp_path / "a.parquet").classes[-1] == str(number)
