"""Sources: listing, ids, class order, and what becomes of files that are not what they should be."""

from __future__ import annotations

import io
import os
import pickle
import struct
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


def test_an_empty_class_folder_keeps_its_number(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("bird/", b"")
        for name, content in ANIMALS.items():
            archive.writestr(name, content)
    write_folder(tmp_path / "a", ANIMALS)
    (tmp_path / "a" / "bird").mkdir()
    for source in (FolderSource(tmp_path / "a"), ZipSource(tmp_path / "a.zip")):
        assert source.classes == ("bird", "cat", "dog")
        assert source.labels.tolist() == [1, 1, 1, 2]


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


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"], ids=["missing", "not text"])
def test_a_class_file_that_cannot_be_read_is_an_input_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputFileError, match="one class folder name per line"):
        FolderSource(write_folder(tmp_path / "a", ANIMALS), classes=tmp_path / "classes.txt")


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


def test_odd_and_huge_zip_entries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmem.data.listing.MAX_ENTRY_BYTES", 4000)
    source = ZipSource(write_zip(tmp_path / "a.zip", ANIMALS | {"cat/big.png": bytes(4001), "cat//a.png": b"x"}))
    assert list(source.names) == ANIMAL_NAMES
    assert source.skipped == [
        Skipped("cat//a.png", "an empty folder name in its path"),
        Skipped("cat/big.png", "huge: 4001 bytes, the limit is 4000"),
    ]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/a.png", encoded())
        archive.writestr("cat/a.png", encoded())
    with pytest.raises(UsageError, match="for both 'cat/a.png' and 'cat/a.png'"):
        ZipSource(tmp_path / "a.zip")


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
