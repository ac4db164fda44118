"""Sources: listing, ids, class order, and what becomes of files that are not what they should be."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmem.data.decoding import DamagedImage, Skipped, decode
from fastmem.data.sources import (
    ArraySource,
    FolderSource,
    ImageSource,
    ZipSource,
    embedded_source,
    image_ids,
    open_source,
)
from fastmem.errors import FastmemError, InputFileError, UsageError


def encoded(shade: int = 0, size: tuple[int, int] = (6, 5), mode: str = "RGB", file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def png_that_declares(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


ANIMALS = {
    "dog/1.png": encoded(1),
    "cat/b.PNG": encoded(2),
    "cat/a.jpeg": encoded(3, file_format="JPEG"),
    "cat/deep/er/a.png": encoded(4),
}
FLAT = {"b.png": encoded(1), "a.PNG": encoded(2), "c.jpeg": encoded(3, file_format="JPEG"), "README": b"free"}
ANIMAL_NAMES = ["cat/a.jpeg", "cat/b.PNG", "cat/deep/er/a.png", "dog/1.png"]


def below(prefix: str, files: dict[str, bytes] = ANIMALS) -> dict[str, bytes]:
    return {f"{prefix}/{name}": content for name, content in files.items()}


def write(kind: str, tmp_path: Path, files: dict[str, bytes]) -> Path:
    return write_folder(tmp_path / "images", files) if kind == "folder" else write_zip(tmp_path / "images.zip", files)


both_kinds = pytest.mark.parametrize("kind", ["folder", "zip"])


@both_kinds
@pytest.mark.parametrize(
    ("prefix", "split"),
    [("", None), ("", ""), ("", "."), ("train", None), ("train", "train"), ("val", "val"), ("sets/a", "sets/a")],
)
def test_images_are_listed_by_label_and_name(kind: str, prefix: str, split: str | None, tmp_path: Path) -> None:
    source = open_source(write(kind, tmp_path, below(prefix) if prefix else ANIMALS), split)
    assert list(source.names) == ANIMAL_NAMES
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1]
    assert (source.ids.dtype, source.labels.dtype, len(source)) == (np.int64, np.int64, 4)
    assert source.skipped == []
    assert source.description.startswith(f"{kind} {tmp_path}")
    assert [source.name(image_id) for image_id in source.ids] == ANIMAL_NAMES
    for index, name in enumerate(source.names):
        assert np.array_equal(source.read(index), decode(io.BytesIO(ANIMALS[name])))


@both_kinds
def test_train_is_chosen_where_there_is_one(kind: str, tmp_path: Path) -> None:
    files = below("train") | below("heldout", {"cat/z.png": encoded(9)}) | {"LICENSE": b"free"}
    path = write(kind, tmp_path, files)
    assert list(open_source(path).names) == ANIMAL_NAMES
    assert list(open_source(path, "heldout").names) == ["cat/z.png"]
    assert open_source(path).skipped == []


@pytest.mark.parametrize(
    ("top", "split"), [("top", None), ("top/train", None), ("top/train", "train"), ("top/b", "b"), ("top", "")]
)
def test_one_folder_around_everything_in_a_zip_is_looked_through(top: str, split: str | None, tmp_path: Path) -> None:
    source = ZipSource(write_zip(tmp_path / "a.zip", below(top) | {"__MACOSX/top/cat/._a.png": b"x"}), split)
    assert list(source.names) == ANIMAL_NAMES
    assert np.array_equal(source.ids, image_ids(ANIMAL_NAMES))


def test_a_zip_of_one_class_keeps_its_class(tmp_path: Path) -> None:
    assert ZipSource(write_zip(tmp_path / "a.zip", {"cat/a.png": encoded()})).classes == ("cat",)


def test_ids_are_a_hash_of_the_name_and_never_change() -> None:
    ids = image_ids(["cat/a.png", "n01440764/n01440764_10026.JPEG", "chat/é.png"])
    assert ids.tolist() == [5713174007890925452, 3307150170612657708, 4972273888962248057]
    assert ids.min() >= 0


def test_ids_depend_on_neither_place_kind_nor_neighbours(tmp_path: Path) -> None:
    folder = FolderSource(write_folder(tmp_path / "a", ANIMALS))
    fewer = FolderSource(
        write_folder(tmp_path / "b" / "train", {name: encoded() for name in reversed(ANIMAL_NAMES[1:])})
    )
    zipped = ZipSource(write_zip(tmp_path / "c.zip", dict(reversed(ANIMALS.items()))))
    array = ArraySource(np.zeros((2, 4, 4, 3), np.uint8), [1, 0], classes=("cat", "dog"))
    files = FolderSource(write_folder(tmp_path / "d", {"dog/00000000": b"", "dog/00000000.png": encoded()}))
    assert np.array_equal(folder.ids, zipped.ids)
    assert np.array_equal(folder.ids[1:], fewer.ids)
    assert list(array.names) == ["dog/00000000", "cat/00000001"]
    assert np.array_equal(array.ids, image_ids(array.names))
    assert list(files.names) == ["dog/00000000.png"]


def test_an_unknown_id_is_refused(tmp_path: Path) -> None:
    source = FolderSource(write_folder(tmp_path, ANIMALS))
    with pytest.raises(UsageError, match="1 that are not there, the first 5"):
        source.name(5)
    with pytest.raises(UsageError, match=f"1 that are not there, the first {2**63 - 1}"):
        source.index_of(np.array([source.ids[0], 2**63 - 1]))
    assert source.index_of(source.ids[::-1]).tolist() == [3, 2, 1, 0]


@both_kinds
@pytest.mark.parametrize("order", ["list", "file"])
def test_a_class_order_sets_the_labels(kind: str, order: str, tmp_path: Path) -> None:
    classes = ["dog", "ant", "cat"]
    if order == "file":
        classes = tmp_path / "classes.txt"
        classes.write_text("\ufeffdog\r\nant\r\n cat \r\n\r\n", encoding="utf-8")
    source = open_source(write(kind, tmp_path, ANIMALS), classes=classes)
    assert source.classes == ("dog", "ant", "cat")
    assert list(source.names) == ["dog/1.png", *ANIMAL_NAMES[:3]]
    assert source.labels.tolist() == [0, 2, 2, 2]
    assert np.array_equal(np.sort(source.ids), np.sort(image_ids(ANIMAL_NAMES)))


def with_empty(kind: str, tmp_path: Path, *names: str) -> Path:
    path = write(kind, tmp_path, ANIMALS)
    for name in names:
        if kind == "folder":
            (path / name).mkdir()
        else:
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(f"{name}/", b"")
    return path


@both_kinds
def test_a_class_folder_without_images_is_refused_where_it_would_move_labels(kind: str, tmp_path: Path) -> None:
    path = with_empty(kind, tmp_path, "bird", "lost")
    with pytest.raises(UsageError, match=r"got none in 'bird' and 1 others: each would .*\(--classes FILE\)"):
        open_source(path)
    # in a given order it has a number of its own, and one that is not in the order moves nothing
    source = open_source(path, classes=["bird", "cat", "dog"])
    assert source.classes == ("bird", "cat", "dog")
    assert source.labels.tolist() == [1, 1, 1, 2]


@both_kinds
def test_a_class_folder_of_other_files_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path, ANIMALS | {"heic/1.heic": b"x"})
    with pytest.raises(UsageError, match=r"got none in 'heic' \(heic/1.heic: not an image file \(.heic extension\)\)"):
        open_source(path)


SYSTEM = (
    "__MACOSX/n01/._1.png",
    "__MACOSX/n01/1.png",
    "n01/__macosx/1.png",
    "n01/@eaDir/1.png/SYNOPHOTO_THUMB_M.png",
    "@eaDir/1.png",
    "#recycle/1.png",
    "#Snapshot/a/1.png",
    "lost+found/1.png",
    "$RECYCLE.BIN/S-1/1.png",
    "System Volume Information/1.png",
    "n01/.Trash-1000/1.png",
    ".AppleDouble/1.png",
    ".thumbnails/1.png",
    "n01/.ipynb_checkpoints/1-checkpoint.png",
    "@Recently-Snapshot/1.png",
    "n01/@SynoResource/1.png",
    "found.000/1.png",
    "n01/._1.png",
    "n01/.DS_Store",
    "n01/Thumbs.db",
    "n01/Desktop.ini",
    "ehthumbs.db",
    "n01/1.png:Zone.Identifier",
    "n01/1.png@SynoEAStream",
)


@both_kinds
@pytest.mark.parametrize("name", SYSTEM)
def test_files_of_the_system_are_passed_over(kind: str, name: str, tmp_path: Path) -> None:
    source = open_source(write(kind, tmp_path, {"n01/1.png": encoded(1), "n02/1.png": encoded(2), name: encoded(3)}))
    assert (source.classes, list(source.names), source.skipped) == (("n01", "n02"), ["n01/1.png", "n02/1.png"], [])


@both_kinds
@pytest.mark.parametrize("name", ["recycled", "macosx", "snapshot", "eaDir", "@", "lost", "thumbs", "found.0000"])
def test_a_class_may_be_named_almost_like_the_system(kind: str, name: str, tmp_path: Path) -> None:
    assert open_source(write(kind, tmp_path, {f"{name}/1.png": encoded(1)})).classes == (name,)


@both_kinds
@pytest.mark.parametrize(
    ("suffix", "file_format"),
    [
        (".jpg", "JPEG"),
        (".jpeg", "JPEG"),
        (".png", "PNG"),
        (".ppm", "PPM"),
        (".bmp", "BMP"),
        (".pgm", "PPM"),
        (".tif", "TIFF"),
        (".tiff", "TIFF"),
        (".webp", "WEBP"),
        (".JPEG", "PNG"),
        (".png", "GIF"),
        (".gif", "BMP"),
        (".bmp", "WEBP"),
    ],
)
def test_the_content_decides_on_the_format(kind: str, suffix: str, file_format: str, tmp_path: Path) -> None:
    content = encoded(1, mode="L" if suffix == ".pgm" else "RGB", file_format=file_format)
    source = open_source(write(kind, tmp_path, {f"cat/1{suffix}": content}))
    assert np.array_equal(source.read(0), decode(io.BytesIO(content)))


@both_kinds
@pytest.mark.parametrize(
    ("files", "split", "classes", "message"),
    [
        pytest.param(ANIMALS, "val", None, "expected a split 'val'.*got the folders cat, dog", id="no such split"),
        pytest.param({"cat/a.txt": b"x"}, None, None, "per class.*got 1 folders without an image", id="no image"),
        pytest.param({"a.png": encoded()}, None, None, "got 1 image that lies in no class folder", id="one image"),
        pytest.param(FLAT, None, None, "per class.*got 3 images that lie in no class folder: put", id="flat"),
        pytest.param(FLAT | {"cat/a.txt": b"x"}, None, None, "got 3 images", id="flat beside an empty folder"),
        pytest.param(below("train", FLAT), "train", None, "[/:]train, got 3 images", id="flat split"),
        pytest.param({"train/a.png": b"x"}, None, None, '"" for the folder itself', id="a class named train"),
        pytest.param(below("val") | below("test"), None, None, r"like splits \(test, val\)", id="only other splits"),
        pytest.param(ANIMALS, None, ["dog"], "got 'cat' and 0 others", id="class not in the order"),
        pytest.param(ANIMALS, None, ["dog", "cat", "dog"], "got 'dog' at place 3", id="class twice in the order"),
        pytest.param(ANIMALS, None, ["dog", "", "cat"], "got '' at place 2", id="empty line in the order"),
    ],
)
def test_a_layout_that_is_not_understood_is_refused(
    kind: str, files: dict[str, bytes], split: str | None, classes: list[str] | None, message: str, tmp_path: Path
) -> None:
    path = write(kind, tmp_path, files)
    with pytest.raises(UsageError, match=message) as refusal:
        open_source(path, split, classes)
    assert "\n" not in str(refusal.value)


def test_classes_named_like_splits_can_be_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, below("val") | below("test"))
    assert FolderSource(tmp_path, split="").classes == ("test", "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param("dog\ncat".encode("utf-16"), "bytes that are not UTF-8 from 0 on", id="utf-16"),
        pytest.param("dog\ncat".encode("utf-16-le"), "a zero byte", id="utf-16 without a mark"),
        pytest.param("dog\ncafé".encode("latin-1"), "bytes that are not UTF-8 from 7 on", id="latin-1"),
        pytest.param(b"dog\0cat", "a zero byte", id="zero byte"),
        pytest.param(b"dog\n" * 100, "more than 300 bytes", id="huge"),
    ],
)
def test_a_class_file_that_cannot_be_read_is_an_input_error(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmem.data.class_order.MAX_LIST_BYTES", 300)
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputFileError, match=f"one class folder name per line .*{message}") as refusal:
        FolderSource(write_folder(tmp_path / "a", ANIMALS), classes=tmp_path / "classes.txt")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "long name", "zero in the name"])
def test_a_class_file_that_is_no_file_is_an_input_error(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = {"device": "/dev/zero", "pipe": tmp_path / "pipe", "folder": tmp_path, "long name": "x" * 5000}
    place = places.get(kind, "a\0b")
    with pytest.raises(InputFileError, match="one class folder name per line"):
        FolderSource(write_folder(tmp_path / "a", ANIMALS), classes=place)


SYNSETS = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"


@pytest.mark.parametrize(
    ("folders", "text", "classes"),
    [
        pytest.param(("n01443537",), SYNSETS, ("n01440764", "n01443537"), id="imagenet"),
        pytest.param(tuple(SYNSETS.splitlines()), SYNSETS, tuple(SYNSETS.splitlines()), id="folders named so"),
        pytest.param(("big cat", "n1 dog"), "n1 dog\r\nbig cat\r\n", ("n1 dog", "big cat"), id="spaces"),
        pytest.param(("n01443537",), "n01443537\rn01440764", ("n01443537", "n01440764"), id="numbers alone"),
        pytest.param(("a\x85b", "c\u2028d"), "c\u2028d\na\x85b", ("c\u2028d", "a\x85b"), id="rare line ends"),
    ],
)
def test_a_class_file_names_folders(folders: tuple, text: str, classes: tuple, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8", newline="")
    path = write_folder(tmp_path / "a", {f"{folder}/1.png": encoded() for folder in folders})
    assert FolderSource(path, classes=tmp_path / "classes.txt").classes == classes


def test_names_in_a_class_order_are_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got 1 at place 2"):
        FolderSource(write_folder(tmp_path, ANIMALS), classes=["cat", 1])


def test_missing_and_wrong_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for opened in (FolderSource, ZipSource, open_source):
        with pytest.raises(InputFileError, match="nothing there"):
            opened(tmp_path / "missing.zip")
    with pytest.raises(UsageError, match=r"got a file; give a folder or a \.zip"):
        open_source(tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip"], ids=["empty", "no directory"])
def test_a_damaged_zip_is_an_input_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputFileError, match="one that cannot be read") as refusal:
        open_source(tmp_path / "a.zip")
    assert refusal.value.exit_code == 3


def test_a_cut_off_zip_is_an_input_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ANIMALS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputFileError, match="one that cannot be read"):
        ZipSource(path)


def test_a_folder_that_cannot_be_listed_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, ANIMALS)
    scandir = os.scandir

    def guarded(place: str):
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(InputFileError, match="dog, got Permission denied"):
        FolderSource(tmp_path)


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    strays = {"cat/notes.txt": b"x", "README": b"x", "stray.png": encoded(), ".hidden.png": b"", "cat/.git/a.png": b""}
    folder = FolderSource(write_folder(tmp_path / "a", ANIMALS | strays))
    zipped = ZipSource(write_zip(tmp_path / "a.zip", ANIMALS | strays))
    assert list(folder.names) == list(zipped.names) == ANIMAL_NAMES
    assert folder.skipped == [
        Skipped("README", "not an image file (no extension)"),
        Skipped("cat/notes.txt", "not an image file (.txt extension)"),
        Skipped("stray.png", "not in a class folder"),
    ]
    assert zipped.skipped == folder.skipped


def test_special_files_and_links_in_a_circle_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, ANIMALS)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "cat" / "circle").symlink_to(tmp_path)
    (tmp_path / "dog" / "linked.png").symlink_to("1.png")
    with open(os.fsencode(tmp_path / "dog") + b"/\xff.png", "wb"):
        pass
    source = FolderSource(tmp_path)
    assert list(source.names) == [*ANIMAL_NAMES, "dog/linked.png"]
    assert source.skipped == [
        Skipped("cat/broken.png", "not a regular file"),
        Skipped("cat/circle", "a link to a folder that it is in"),
        Skipped("cat/pipe.png", "not a regular file"),
        Skipped("dog/\\udcff.png", "the name is not UTF-8"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["./cat/1.png", "./dog/1.png"], id="dot slash"),
        pytest.param(["././cat//1.png", "dog/./1.png"], id="dots and empty parts"),
        pytest.param(["cat\\1.png", "dog\\1.png"], id="backslashes"),
        pytest.param([".\\cat\\1.png", "dog/1.png"], id="both slashes"),
        pytest.param(["set\\train\\cat\\1.png", "set\\train\\dog\\1.png"], id="backslashes around everything"),
        pytest.param(["./set/cat/1.png", "./set/dog/1.png", "__MACOSX/set/cat/._1.png"], id="dot slash and a folder"),
    ],
)
def test_names_in_a_zip_are_understood_however_they_are_written(names: list[str], tmp_path: Path) -> None:
    source = ZipSource(write_zip(tmp_path / "a.zip", {name: encoded(shade) for shade, name in enumerate(names)}))
    assert (list(source.names), source.skipped) == (["cat/1.png", "dog/1.png"], [])
    assert np.array_equal(source.ids, image_ids(["cat/1.png", "dog/1.png"]))
    for shade in (0, 1):
        assert np.array_equal(source.read(shade), decode(io.BytesIO(encoded(shade))))


def test_odd_and_huge_zip_entries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmem.data.listing.MAX_ENTRY_BYTES", 4000)
    path = write_zip(tmp_path / "a.zip", ANIMALS | {"cat/big.png": bytes(4001), "/cat/0.png": b"x"})
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../cat/0.png", "cat/../../0.png", "C:/cat/0.png", "..\\cat\\0.png"):
            archive.writestr(name, b"x")
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "a.jpeg")
    source = ZipSource(path)
    assert list(source.names) == ANIMAL_NAMES
    outside = "its path leads out of the archive"
    assert source.skipped == [
        Skipped("../cat/0.png", outside),
        Skipped("..\\cat\\0.png", outside),
        Skipped("/cat/0.png", outside),
        Skipped("C:/cat/0.png", outside),
        Skipped("cat/../../0.png", outside),
        Skipped("cat/big.png", "huge: 4001 bytes, the limit is 4000"),
        Skipped("cat/link.png", "a link"),
    ]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("other", ["cat/a.png", "./cat/a.png", "cat\\a.png", "cat//a.png"])
def test_of_the_same_name_twice_the_last_is_read(other: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/a.png", encoded(1))
        archive.writestr(other, encoded(2))
    source = ZipSource(tmp_path / "a.zip")
    assert list(source.names) == ["cat/a.png"]
    assert source.skipped == [Skipped("cat/a.png", "the archive holds a later file of the same name")]
    assert np.array_equal(source.read(0), decode(io.BytesIO(encoded(2))))


def patched(path: Path, field: int, size: int, value: int) -> Path:
    """Overwrite a field of the last entry, counted from the start of its record in the zip's directory."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02") + field
    content[at : at + size] = value.to_bytes(size, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("field", "size", "value", "reason"),
    [
        pytest.param(8, 2, 1, "encrypted", id="encrypted"),
        *[
            pytest.param(
                10,
                2,
                method,
                f"compressed by a method that is not read (number {method}): pack it with deflate",
                id=name,
            )
            for method, name in ((9, "deflate64"), (12, "bzip2"), (14, "lzma"), (93, "zstandard"), (99, "none at all"))
        ],
        pytest.param(24, 4, 2**31, f"huge: {2**31} bytes, the limit is {2**28}", id="a size of 2 GiB"),
    ],
)
def test_zip_entries_that_cannot_be_unpacked_are_named(
    field: int, size: int, value: int, reason: str, tmp_path: Path
) -> None:
    path = write_zip(tmp_path / "a.zip", ANIMALS | {"dog/2.png": encoded()})
    source = ZipSource(patched(path, field, size, value))
    assert list(source.names) == ANIMAL_NAMES
    assert source.skipped == [Skipped("dog/2.png", reason)]


def test_a_bomb_that_says_a_small_size_stays_small(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ANIMALS)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dog/2.png", bytes(2**26))
    source = ZipSource(patched(path, 24, 4, 1000))
    tracemalloc.start()
    with pytest.raises(DamagedImage, match="dog/2.png: damaged in the zip"):
        source.read(4)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_zip_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    source = ZipSource(write_zip(tmp_path / "a.zip", ANIMALS))
    write_zip(tmp_path / "a.zip", {"bird/1.png": encoded(1)})
    for index in (0, 3):
        with pytest.raises(InputFileError, match="a.zip as it was listed, with"):
            source.read(index)


def test_an_image_that_a_zip_of_the_same_size_lacks_is_damaged(tmp_path: Path) -> None:
    source = ZipSource(write_zip(tmp_path / "a.zip", ANIMALS))
    size = (tmp_path / "a.zip").stat().st_size
    write_zip(tmp_path / "a.zip", {name[::-1]: content for name, content in ANIMALS.items()})
    assert (tmp_path / "a.zip").stat().st_size == size
    for index in (0, 3):
        with pytest.raises(DamagedImage, match="not in the zip any more"):
            source.read(index)


@pytest.mark.parametrize("opened", [FolderSource, ZipSource, open_source])
@pytest.mark.parametrize("name", ["x" * 300, "a" * 5000, "a\0b.zip", "file.zip/a"])
def test_paths_that_cannot_be_are_refused(opened, name: str, tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"x")
    with pytest.raises(InputFileError, match="check the path"):
        opened(tmp_path / name)


@pytest.mark.parametrize("opened", [FolderSource, ZipSource, open_source])
def test_a_pipe_in_place_of_images_is_refused(opened, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(FastmemError, match="got a file|got something that is no file"):
        opened(tmp_path / "a.zip")


def test_links_in_a_circle_and_links_to_nothing_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, ANIMALS)
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    source = FolderSource(tmp_path)
    assert list(source.names) == ANIMAL_NAMES
    assert [(file.name, file.reason[:16]) for file in source.skipped] == [("cat/self.png", "cannot be read: ")]
    # a class on a disk that is not there
    (tmp_path / "bird").symlink_to("/nowhere/bird")
    with pytest.raises(UsageError, match="got none in 'bird'"):
        FolderSource(tmp_path)
    assert list(FolderSource(tmp_path, classes=["bird", "cat", "dog"]).labels) == [1, 1, 1, 2]


def test_a_class_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, ANIMALS)
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(UsageError, match="names are UTF-8 in .*udce9"):
        FolderSource(tmp_path)


@both_kinds
def test_names_with_odd_characters_are_kept_as_they_are(kind: str, tmp_path: Path) -> None:
    names = ["big cat/a\nb.png", "big cat/\x1b[31m.png", "big cat/猫 é.png"]
    source = open_source(write(kind, tmp_path, dict.fromkeys(names, encoded(1))))
    assert sorted(source.names) == sorted(names)
    assert np.array_equal(source.ids, image_ids(source.names))
    for index in range(3):
        assert source.read(index).size == (6, 5)


DAMAGED = [
    pytest.param(b"", "empty file", id="empty"),
    pytest.param(b"hello", "not an image that can be read", id="not an image"),
    pytest.param(encoded(1, (64, 64))[:3000], "damaged: image file is truncated", id="truncated png"),
    pytest.param(encoded(1, (64, 64), file_format="JPEG")[:900], "damaged: image file is trunc", id="truncated jpeg"),
    pytest.param(encoded()[:40], "damaged|not an image", id="header only"),
    pytest.param(png_that_declares(20_000, 10_000), "huge: ", id="200 megapixels"),
    pytest.param(png_that_declares(10_001, 10_000), "huge: 10001x10000 pixels, the limit", id="just above the limit"),
    pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read", id="eps"),
]


@both_kinds
@pytest.mark.parametrize(("content", "reason"), DAMAGED)
def test_a_damaged_image_is_listed_and_named_when_read(kind: str, content: bytes, reason: str, tmp_path: Path) -> None:
    source = open_source(write(kind, tmp_path, ANIMALS | {"cat/0.png": content}))
    with pytest.raises(DamagedImage, match=reason) as damage:
        source.read(0)
    assert damage.value.name == "cat/0.png"
    assert str(damage.value) == f"cat/0.png: {damage.value.reason}"
    assert isinstance(damage.value, FastmemError)
    assert pickle.loads(pickle.dumps(damage.value)).reason == damage.value.reason
    assert source.read(1).size == (6, 5)


def test_a_file_that_went_away_is_a_damaged_image(tmp_path: Path) -> None:
    source = FolderSource(write_folder(tmp_path, ANIMALS))
    (tmp_path / "cat" / "a.jpeg").unlink()
    with pytest.raises(DamagedImage, match="cannot be read: No such file"):
        source.read(0)
    os.mkfifo(tmp_path / "cat" / "a.jpeg")
    for use in (source.read, source.digest):
        with pytest.raises(DamagedImage, match="cannot be read: not a regular file"):
            use(0)


def test_a_folder_that_went_away_ends_the_run(tmp_path: Path) -> None:
    source = FolderSource(write_folder(tmp_path / "a", ANIMALS))
    (tmp_path / "a").rename(tmp_path / "b")
    for use in (source.read, source.digest):
        with pytest.raises(InputFileError, match="got none any more; bring it back") as refusal:
            use(0)
        assert not isinstance(refusal.value, DamagedImage)


def test_a_disk_that_fails_is_not_called_a_damaged_image() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 100:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(DamagedImage, match="^cannot be read: Input/output error$"):
        decode(Failing(encoded(1, (64, 64), file_format="JPEG")))


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    source = FolderSource(write_folder(tmp_path, ANIMALS))
    with open(tmp_path / "cat" / "a.jpeg", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(2**40)
    with pytest.raises(DamagedImage, match=f"huge: {2**40} bytes, the limit is {2**30}"):
        source.read(0)


def test_a_flipped_bit_in_a_zip_is_a_damaged_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ANIMALS)
    content = bytearray(path.read_bytes())
    content[content.index(ANIMALS["dog/1.png"]) + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedImage, match="damaged in the zip: Bad CRC"):
        ZipSource(path).read(3)


def animated_gif() -> bytes:
    frames = [Image.new("RGB", (6, 5), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def sixteen_bit() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(5, 6) * 1000).save(buffer, "PNG")
    return buffer.getvalue()


def turned_by_exif() -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 5), "red").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encoded(1, mode="L"), id="grey"),
        pytest.param(encoded(1, mode="P"), id="palette"),
        pytest.param(encoded(1, mode="RGBA"), id="alpha"),
        pytest.param(encoded(1, mode="LA"), id="grey and alpha"),
        pytest.param(encoded(1, mode="1"), id="one bit"),
        pytest.param(encoded(1, mode="CMYK", file_format="JPEG"), id="cmyk"),
        pytest.param(encoded(1, file_format="WEBP"), id="webp"),
        pytest.param(encoded(1, file_format="TIFF"), id="tiff"),
        pytest.param(encoded(1, file_format="BMP"), id="bmp"),
        pytest.param(encoded(1, file_format="PPM"), id="ppm"),
        pytest.param(sixteen_bit(), id="16 bit"),
        pytest.param(animated_gif(), id="animated"),
        pytest.param(turned_by_exif(), id="turned by exif"),
    ],
)
def test_every_kind_of_picture_becomes_rgb_as_pillow_converts_it(content: bytes) -> None:
    image = decode(io.BytesIO(content))
    assert (image.mode, image.size) == ("RGB", (6, 5))
    assert np.array_equal(image, Image.open(io.BytesIO(content)).convert("RGB"))


def png_with(*chunks: tuple[bytes, bytes], last: bool = False) -> bytes:
    content = encoded(1)
    at = -12 if last else 33
    made = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return content[:at] + made + content[at:]


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    content = encoded(1, file_format="JPEG")
    return content[:2] + b"".join(struct.pack(">HH", m, len(c) + 2) + c for m, c in segments) + content[2:]


def saved_with(file_format: str, **options: bytes) -> bytes:
    buffer = io.BytesIO()
    decode(io.BytesIO(encoded(1, file_format=file_format))).save(buffer, file_format, **options)
    return buffer.getvalue()


LARGE = zlib.compress(bytes(90_000_000))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png_with((b"iCCP", b"icc\0\0" + LARGE)), id="png profile"),
        pytest.param(png_with((b"zTXt", b"k\0\0" + LARGE)), id="png packed text"),
        pytest.param(png_with((b"iTXt", b"k\0\1\0\0\0" + LARGE)), id="png international text"),
        pytest.param(png_with((b"tEXt", b"k\0" + bytes(70_000_000))), id="png text"),
        pytest.param(png_with(*[(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))] * 70), id="png many texts"),
        pytest.param(png_with((b"zTXt", b"k\0\0" + LARGE), last=True), id="png text after the pixels"),
        pytest.param(png_with((b"eXIf", b"not exif")), id="png damaged exif"),
        pytest.param(jpeg_with(*[(0xFFE1, b"Exif\0\0" + bytes(65_000))] * 40), id="jpeg exif"),
        pytest.param(jpeg_with(*[(0xFFE2, b"ICC_PROFILE\0\1\1" + bytes(65_000))] * 40), id="jpeg profile"),
        pytest.param(jpeg_with(*[(0xFFED, b"Photoshop 3.0\x00" + bytes(65_000))] * 40), id="jpeg photoshop"),
        pytest.param(jpeg_with(*[(0xFFFE, bytes(65_000))] * 40), id="jpeg comments"),
        pytest.param(saved_with("WEBP", lossless=True, icc_profile=bytes(5_000_000)), id="webp profile"),
        pytest.param(saved_with("WEBP", lossless=True, exif=b"Exif\0\0" + bytes(5_000_000)), id="webp exif"),
        pytest.param(saved_with("TIFF", icc_profile=bytes(5_000_000)), id="tiff profile"),
        pytest.param(saved_with("GIF", comment=bytes(200_000)), id="gif comment"),
    ],
)
def test_large_or_odd_metadata_does_not_matter(content: bytes) -> None:
    image = decode(io.BytesIO(content))
    if content.startswith((b"\x89PNG", b"II*")):
        assert np.array_equal(image, decode(io.BytesIO(encoded(1))))
    elif content.startswith(b"\xff\xd8"):
        assert np.array_equal(image, decode(io.BytesIO(encoded(1, file_format="JPEG"))))
    else:
        assert image.size == (6, 5)


def test_an_animation_gives_its_first_frame() -> None:
    assert decode(io.BytesIO(animated_gif())).getpixel((0, 0)) == (255, 0, 0)


def test_decoding_is_silent(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(DamagedImage, match="damaged"):
        decode(io.BytesIO(png_that_declares(9_500, 9_500)))
    assert not recwarn.list


def test_an_array_gives_its_images_back() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    source = ArraySource(images, [2, 0, 2], ids=[7, 5, 6])
    assert source.classes == ("0", "1", "2")
    assert list(source.names) == ["2/00000000", "0/00000001", "2/00000002"]
    assert (source.ids.tolist(), source.labels.tolist()) == ([7, 5, 6], [2, 0, 2])
    assert source.name(6) == "2/00000002"
    for index in range(3):
        assert np.array_equal(source.read(index), images[index])


def some(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("images", "labels", "ids", "classes", "message"),
    [
        pytest.param(some((2, 4, 4, 3), np.float32), [0, 0], None, None, r"got float32 \[2, 4, 4, 3\]", id="float"),
        pytest.param(some((2, 3, 4, 4)), [0, 0], None, None, r"got uint8 \[2, 3, 4, 4\]", id="channels first"),
        pytest.param(some((2, 4, 5, 3)), [0, 0], None, None, "expected images as uint8", id="not square"),
        pytest.param(some((4, 4, 3)), [0], None, None, "expected images as uint8", id="one image"),
        pytest.param(some((0, 4, 4, 3)), [], None, None, "expected images as uint8", id="no image"),
        pytest.param(some((2, 4, 4, 3)), [0], None, None, "expected labels as 2 integers", id="too few labels"),
        pytest.param(some((2, 4, 4, 3)), [0, -1], None, None, "from -1", id="negative label"),
        pytest.param(some((2, 4, 4, 3)), [0.0, 1.0], None, None, "got float64", id="float labels"),
        pytest.param(some((2, 4, 4, 3)), [0, 10**6], None, None, "labels below 1000000", id="label of a million"),
        pytest.param(some((2, 4, 4, 3)), [0, 2], None, ["a", "b"], "labels below 2", id="label without a class"),
        pytest.param(some((2, 4, 4, 3)), [0, 1], [3], None, "expected ids as 2 integers", id="too few ids"),
        pytest.param(some((2, 4, 4, 3)), [0, 1], [3, 3], None, "got id 3 for both '0/00000000' and", id="same id"),
    ],
)
def test_an_array_of_another_form_is_refused(
    images: np.ndarray, labels: list, ids: list[int] | None, classes: list[str] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ArraySource(images, labels, ids, classes)


def every_source(tmp_path: Path) -> list[ImageSource]:
    return [
        FolderSource(write_folder(tmp_path / "a", ANIMALS)),
        ZipSource(write_zip(tmp_path / "a.zip", ANIMALS)),
        ArraySource(np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8), [0, 1]),
    ]


def test_sources_survive_pickling(tmp_path: Path) -> None:
    for source in every_source(tmp_path):
        before = source.read(1)
        copy = pickle.loads(pickle.dumps(source))
        assert np.array_equal(copy.ids, source.ids)
        assert list(copy.names) == list(source.names)
        assert np.array_equal(copy.read(1), before)


@pytest.mark.parametrize(("split", "count"), [("train", 823), ("heldout", 192)])
def test_the_embedded_images_are_there(split: str, count: int) -> None:
    source = embedded_source(split)
    assert (len(source), len(source.classes), source.skipped) == (count, 41, [])
    assert source.read(count - 1).size == (64, 64)


def test_the_embedded_images_have_no_other_split() -> None:
    with pytest.raises(UsageError, match="expected a split 'val'.*heldout, train"):
        embedded_source("val")
