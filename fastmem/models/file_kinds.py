"""What a file is, told by its content and never by its suffix, and a name for each kind that is no checkpoint."""

from __future__ import annotations

import codecs
import os
import stat
import zipfile
from enum import Enum
from pathlib import Path, PurePosixPath

from fastmem.errors import InputFileError

# how much of a file's beginning tells what it is
HEAD = 512
# the number with which torch's files from before version 1.6 begin, as it is pickled
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".npy")

AGAIN = "fetch it again"
UNPACK = "unpack it, and give the checkpoint that it holds"
WEIGHTS_ALONE = "save the weights alone, with torch.save(model.state_dict(), FILE)"
OWN_LIBRARY = "load it with the library that wrote it, and save a state dict of torch tensors"
GIVE_CHECKPOINT = "give the checkpoint in its place"
# where a kind's first bytes stand, what they are, what the kind is, and what to do
FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer, which stands for a file", "get that, with `git lfs pull`"),
    (0, b"GGUF", "a GGUF file of llama.cpp", OWN_LIBRARY),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write", OWN_LIBRARY),
    (0, b"\x93NUMPY", "an array of numpy", OWN_LIBRARY),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"PAR1", "a parquet table", GIVE_CHECKPOINT),
    (0, b"SQLite format 3\x00", "an SQLite database", GIVE_CHECKPOINT),
    (0, b"%PDF", "a PDF document", GIVE_CHECKPOINT),
    (0, b"\x89PNG", "a PNG image", GIVE_CHECKPOINT),
    (0, b"\xff\xd8\xff", "a JPEG image", GIVE_CHECKPOINT),
    (0, b"\x7fELF", "a program", GIVE_CHECKPOINT),
    (4, b"TFL3", "a TensorFlow Lite model", OWN_LIBRARY),
)


class Kind(Enum):
    """The kinds of files that weights are read from."""

    ZIP = "torch's archive"
    LEGACY = "torch's file from before version 1.6"
    SAFETENSORS = "safetensors"
    INDEX = "index of a checkpoint in parts"


def tell_kind(path: Path) -> Kind:
    """The kind of a checkpoint file.

    Raises: InputFileError where the file is missing, cannot be read, or is another kind of file; it names that.
    """
    head = _read_head(path)
    if head.startswith(b"PK\x03\x04"):
        return _tell_archive(path)
    if int.from_bytes(head[:8], "little") < 2**48 and head[8:9] == b"{":
        return Kind.SAFETENSORS
    if LEGACY_MAGIC in head[:32]:
        return Kind.LEGACY
    found = next(((what, do) for at, magic, what, do in FOREIGN if head[at:].startswith(magic)), None)
    if found is None:
        if head.lstrip()[:1] == b"{" and _is_text(head):
            return Kind.INDEX
        found = _tell_other(head)
    raise _refusal(path, *found)


def _refusal(path: Path, what: str, advice: str) -> InputFileError:
    return InputFileError(f"expected a .bin, .pth or .safetensors checkpoint in {path}, got {what}: {advice}")


def _read_head(path: Path) -> bytes:
    try:
        # a pipe would be waited for
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _refusal(path, "a device or a pipe", "check the path")
            head = file.read(HEAD)
    except FileNotFoundError as error:
        raise InputFileError(f"expected a checkpoint at {path}, got no such file: check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputFileError(
            f"expected a checkpoint that can be read at {path}, got {reason}: check the path"
        ) from error
    if not head:
        raise _refusal(path, "an empty file", AGAIN)
    if not any(head):
        raise _refusal(path, "a file that begins with zeros alone, as downloads that were cut off do", AGAIN)
    return head


def _tell_archive(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # a damaged directory of an archive brings many kinds of errors
    except Exception as error:
        detail = " ".join(str(error).split())[:100]
        raise _refusal(path, f"a damaged or incomplete archive ({type(error).__name__}: {detail})", AGAIN) from error
    last = {PurePosixPath(name).name for name in names}
    if "archive_format" in last:
        raise _refusal(path, "a program of torch.export", WEIGHTS_ALONE)
    if "data.pkl" in last:
        if "constants.pkl" in last:
            raise _refusal(path, "a TorchScript archive, which holds code", WEIGHTS_ALONE)
        return Kind.ZIP
    suffixes = {PurePosixPath(name).suffix.lower() for name in names if not name.endswith("/")}
    if suffixes == {".npy"}:
        raise _refusal(path, "an archive of numpy's arrays", OWN_LIBRARY)
    if suffixes and suffixes <= set(IMAGES):
        raise _refusal(path, "a zip of images", "give it with --data, and a checkpoint here")
    first = f", which begins with {names[0][:60]}" if names else " of nothing"
    raise _refusal(path, f"a zip archive{first}", UNPACK)


def _tell_other(head: bytes) -> tuple[str, str]:
    """Return what an unknown file is, as far as its beginning tells, and what to do."""
    if _is_text(head):
        start = head.lstrip().lower()
        if start.startswith(b"<!doctype html") or b"<html" in start:
            return "a web page, such as a site's page about the file", f"{AGAIN}, by the link that downloads it"
        if start.startswith(b"<"):
            return "an XML document, such as a site's error", AGAIN
        line = head.decode(errors="replace").strip().splitlines()
        return f"a text file that begins with {line[0][:40] if line else 'spaces'!r}", GIVE_CHECKPOINT
    first, second = head[0], head[1] if len(head) > 1 else 0
    if first == 0x80 and 2 <= second <= 5:
        return "a pickle that torch.save did not write, which could run code", WEIGHTS_ALONE
    # the version of the format, and the name of the program that wrote it
    if first == 0x08 and second < 0x20 and head[2:3] == b"\x12":
        return "an ONNX model", OWN_LIBRARY
    # a small map whose first key is a short text
    if (0x81 <= first <= 0x8F and 0xA0 <= second <= 0xD9) or first in (0xDE, 0xDF):
        return "a msgpack file, as JAX and Flax write", OWN_LIBRARY
    return f"an unknown kind of file, which begins with the bytes {head[:8].hex(' ')}", AGAIN


def _is_text(head: bytes) -> bool:
    try:
        # the end may cut a character in two
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text)
