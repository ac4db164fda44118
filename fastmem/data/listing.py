"""List the images of a folder or a zip file by class, with the files that are left out and the reason for each."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastmem.data.decoding import SUFFIXES, Skipped
from fastmem.data.system_files import is_system_name
from fastmem.errors import InputFileError, UsageError

# a larger file in a zip is left out, because it would be unpacked into memory
MAX_ENTRY_BYTES = 256 * 2**20
# folders of these names are taken for parts of a data set, not for classes
SPLIT_NAMES = frozenset(("train", "val", "valid", "validation", "test", "heldout"))
NO_CLASS_FOLDER = "not in a class folder"
OUTSIDE, LATER = "its path leads out of the archive", "the archive holds a later file of the same name"
# what an entry of a folder is
_FOLDER, _FILE = "folder", "file"
_DRIVE = re.compile("[A-Za-z]:")
# flags of a file in a zip, and the methods of compression that Python unpacks step by step: of the others, a few
# kilobytes may unpack to gigabytes at once
_ENCRYPTED, _UTF8 = 1, 2048
# the header of a file in a zip: its flags, and the lengths of its name and of an extra field behind it
_HEADER, _HEADER_START = struct.Struct("<6sH18xHH"), b"PK\x03\x04"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def no_split(split: str, where: str | Path, present: Sequence[str]) -> str:
    """Return the error message for a split that is not among the folders ``present`` in ``where``."""
    return (
        f"expected a split {split!r} in {where}, got the folders {', '.join(present[:8]) or 'none'}; "
        'give one of them, or "" where the class folders lie there themselves'
    )


def mode_at(path: Path, wanted: str) -> int:
    """Return what ``os.stat`` says of the kind of thing at ``path``; ``wanted`` names it in the error message.

    Raises:
        InputFileError: nothing is there, or it cannot be reached.
    """
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        got = "nothing there" if missing else getattr(error, "strerror", None) or str(error)
        raise InputFileError(f"expected {wanted} at {path}, got {got}; check the path") from error


def regular(path: str, flags: int) -> int:
    """Open a regular file, as an ``opener`` of ``open``.

    Raises:
        OSError: it cannot be opened, or is a folder, a device or a pipe, which might never end or never begin.
    """
    handle = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


def refusal(name: str) -> str | None:
    """Return why a file of this name is no image, or None."""
    suffix = os.path.splitext(name)[1].lower()
    return None if suffix in SUFFIXES else f"not an image file ({suffix or 'no'} extension)"


def list_folder(folder: Path) -> tuple[dict[str, list[str]], list[Skipped]]:
    """Return the image names by class folder, and the files that are left out.

    A name is a path below the class folder. Links are followed, except to a folder that contains the link.

    Raises:
        InputFileError: a folder cannot be listed.
        UsageError: the name of a class folder is not UTF-8.
    """
    found: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    # folders still to list: path, class (None for the top folder), and path below the class folder
    pending: list[tuple[str, str | None, str]] = [(str(folder), None, "")]
    while pending:
        place, owner, prefix = pending.pop()
        for entry in _entries(place):
            if is_system_name(entry.name):
                continue
            full = f"{owner}/{prefix}{entry.name}" if owner is not None else entry.name
            kind = _kind(entry)
            reason = None
            if not is_text(entry.name):
                full = full.encode(errors="backslashreplace").decode()
                reason = "the name is not UTF-8"
                if owner is None and kind == _FOLDER:
                    raise UsageError(
                        f"expected class folders whose names are UTF-8 in {folder}, got {full}: without it the labels "
                        "of others would move, so rename it"
                    )
            elif kind == _FOLDER:
                if entry.is_symlink() and _leads_back(entry.path):
                    reason = "a link to a folder that it is in"
                elif owner is None:
                    found[entry.name] = []
                    pending.append((entry.path, entry.name, ""))
                else:
                    pending.append((entry.path, owner, f"{prefix}{entry.name}/"))
            elif kind != _FILE:
                reason = kind
                if owner is None and entry.is_symlink() and refusal(entry.name):
                    # a class folder on a disk that is not there: without it the labels of others would move
                    found[entry.name] = []
            else:
                reason = refusal(entry.name)
                if reason is None and owner is not None:
                    found[owner].append(prefix + entry.name)
                elif reason is None:
                    reason = NO_CLASS_FOLDER
            if reason is not None:
                skipped.append(Skipped(full, reason))
    return found, sorted(skipped, key=lambda item: item.name)


def folder_names(place: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted.

    Raises:
        InputFileError: the folder cannot be listed.
    """
    return sorted(entry.name for entry in _entries(str(place)) if _kind(entry) == _FOLDER)


def _kind(entry: os.DirEntry[str]) -> str:
    """Return ``_FOLDER`` or ``_FILE``, or the reason why an entry is neither."""
    try:
        if entry.is_dir():
            return _FOLDER
        return _FILE if entry.is_file() else "not a regular file"
    except OSError as error:
        # links in a circle, or a link into a folder that may not be entered
        return f"cannot be read: {error.strerror}"


def _entries(place: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return list(entries)
    except OSError as error:
        raise InputFileError(
            f"expected a folder that can be listed at {place}, got {error.strerror}; check its permissions"
        ) from error


def is_text(name: str) -> bool:
    """Return whether a name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leads_back(link: str) -> bool:
    target = os.path.realpath(link)
    return any(os.path.realpath(parent) == target for parent in Path(link).absolute().parents)


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file for reading.

    Raises:
        InputFileError: the file is missing or damaged.
    """
    if not stat.S_ISREG(mode_at(path, "a zip file of images")):
        raise InputFileError(f"expected a zip file of images at {path}, got something that is no file; check the path")
    try:
        return zipfile.ZipFile(path)
    # a damaged directory makes the library raise exceptions of many kinds
    except Exception as error:
        raise InputFileError(
            f"expected a zip file of images at {path}, got one that cannot be read "
            f"({error or type(error).__name__}); copy it again"
        ) from error


class Member(NamedTuple):
    """A file or folder in an archive.

    Attributes:
        name: its path with ``/`` between folders, without empty parts and dots.
        number: its position in the archive's directory.
        is_folder: whether it is a folder.
        refusal: why it is left out, or None.
    """

    name: str
    number: int
    is_folder: bool
    refusal: str | None


class ZipPlace(NamedTuple):
    """Where a file in a zip lies, and how it is packed.

    Attributes:
        header: position of its own header.
        packed: bytes in the zip.
        unpacked: bytes that it has.
        method: number of the method of compression.
        checksum: CRC-32 of its content.
    """

    header: int
    packed: int
    unpacked: int
    method: int
    checksum: int


def zip_members(entries: Iterable[zipfile.ZipInfo]) -> tuple[list[Member], np.ndarray]:
    """Return the files and folders of a zip file's directory, without those that systems make, and all their places.

    The places are int64 [entries, 5], each a `ZipPlace`.
    """
    members = []
    places = array("q")
    for number, entry in enumerate(entries):
        places.extend((entry.header_offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC))
        path, parts = _parts(entry.filename)
        if not parts or any(is_system_name(part) for part in parts if part != ".."):
            continue
        outside = path.startswith("/") or ".." in parts or _DRIVE.fullmatch(parts[0]) is not None
        name, is_folder = "/".join(parts), path.endswith(("/", "/."))
        if outside:
            members.append(Member(entry.filename, number, is_folder, OUTSIDE))
        else:
            members.append(Member(name, number, is_folder, None if is_folder else _member_refusal(name, entry)))
    return members, np.array(places, np.int64).reshape(-1, len(ZipPlace._fields))


def _parts(name: str) -> tuple[str, list[str]]:
    # some programs write names with a leading "./", and some on Windows separate folders by backslashes
    path = name.replace("\\", "/")
    return path, [part for part in path.split("/") if part not in ("", ".")]


def unzip(place: ZipPlace, name: str, read: Callable[[int, int], bytes]) -> bytes | None:
    """Return the content of a file in a zip, or None where another file lies at its place.

    ``name`` is its path without empty parts and dots, and ``read`` returns the zip's bytes from a position on.

    Raises:
        OSError: the zip cannot be read there.
        ValueError, zlib.error: the content is damaged.
    """
    header = read(place.header, _HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_HEADER_START):
        return None
    _, flags, name_bytes, extra_bytes = _HEADER.unpack(header)
    start = place.header + _HEADER.size
    own = read(start, name_bytes).decode("utf-8" if flags & _UTF8 else "cp437", "replace")
    # as the library reads names
    if "/".join(_parts(zipfile.ZipInfo(own).filename)[1]) != name:
        return None
    packed = read(start + name_bytes + extra_bytes, place.packed)
    if place.method == zipfile.ZIP_STORED:
        content = packed
    else:
        # no more than the zip says, because a file may unpack to much more
        content = zlib.decompressobj(-15).decompress(packed, place.unpacked + 1)
    if len(content) != place.unpacked:
        raise ValueError(f"{len(content)} bytes, expected {place.unpacked}")
    if zlib.crc32(content) != place.checksum:
        raise ValueError("Bad CRC-32")
    return content


def _member_refusal(name: str, entry: zipfile.ZipInfo) -> str | None:
    reason = refusal(name)
    if reason is not None:
        return reason
    if entry.flag_bits & _ENCRYPTED:
        return "encrypted"
    if entry.compress_type not in _METHODS:
        return f"compressed by a method that is not read (number {entry.compress_type}): pack it with deflate"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a link"
    if entry.file_size > MAX_ENTRY_BYTES:
        return f"huge: {entry.file_size} bytes, the limit is {MAX_ENTRY_BYTES}"
    return None


def members_prefix(members: Sequence[Member], split: str | None, where: str) -> str:
    """Return the folders in an archive that hold the class folders, as ``[top folder/][split/]``.

    ``members`` are its contents. ``split`` is None for ``train`` where there is one, and ``""`` for no split.
    ``where`` names the archive in the error message.

    Raises:
        UsageError: the archive has no such split.
    """
    images = [m.name for m in members if not m.is_folder and m.refusal != OUTSIDE and not refusal(m.name)]
    tops = sorted({name.split("/", 1)[0] for name in images if "/" in name})
    # a single top folder is a class if images lie directly in it, and else it just encloses the class folders
    wrapped = len(tops) == 1 and tops[0] not in SPLIT_NAMES and all(name.count("/") > 1 for name in images)
    tried = ["", f"{tops[0]}/"] if wrapped else [""]
    wanted = "train" if split is None else split.strip("/.")
    if wanted:
        for start in tried:
            if any(name.startswith(f"{start}{wanted}/") for name in images):
                return f"{start}{wanted}/"
        if split:
            raise UsageError(no_split(split, where, tops))
    return tried[-1]


def list_members(members: Sequence[Member], prefix: str) -> tuple[dict[str, list[str]], list[Skipped], dict[str, int]]:
    """Return the image names by class folder, the files left out, and the number of each image.

    Only members whose names start with ``prefix`` count, and of equal names the last one. Numbers are by
    ``class/name``.
    """
    found: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    numbers: dict[str, int] = {}
    for member in members:
        if member.refusal == OUTSIDE:
            skipped.append(Skipped(member.name, OUTSIDE))
            continue
        path = f"{member.name}/" if member.is_folder else member.name
        if not path.startswith(prefix) or path == prefix:
            continue
        full = path[len(prefix) :]
        owner, slash, name = full.partition("/")
        if slash:
            found.setdefault(owner, [])
        if member.is_folder:
            continue
        if member.refusal is not None or not slash:
            skipped.append(Skipped(full, member.refusal or NO_CLASS_FOLDER))
            continue
        if full in numbers:
            # as programs that unpack archives do it, the last one counts
            skipped.append(Skipped(full, LATER))
        else:
            found[owner].append(name)
        numbers[full] = member.number
    return found, sorted(skipped, key=lambda item: item.name), numbers
