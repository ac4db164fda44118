"""List the members of a tar file from its headers, which lie between the members; the members are not read.

Read are the formats of old tar, POSIX (ustar and pax) and GNU. Every header has a check sum of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fastmem.errors import InputFileError

BLOCK = 512
# types of members: regular files, folders, links, GNU's long names, and pax's records for one member and for all
_FILES, _FOLDER, _LINKS, _SPARSE = b"0\0007", b"5", b"12", b"S"
_LONG_NAME, _LONG_LINK, _RECORDS, _ALL_RECORDS = b"L", b"K", b"xX", b"g"
# a name or the records of one member that are longer are taken for damage
_MAX_NAME_BYTES = 2**20
# headers are collected and their check sums computed at once
_CHECKED_TOGETHER = 4096
# after its end a tar file has zeros up to a multiple of some size
_PADDING = 64 * 2**10
_NUMBER = re.compile(rb" *([0-7]*)[ \0]*")
# the first bytes of files that hold a compressed tar
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22M\x18": "lz4",
}

# returns a file's bytes from a position on
Read = Callable[[int, int], bytes]


class TarMember(NamedTuple):
    """A member of a tar file.

    Attributes:
        name: its path in the archive.
        start: where its content begins; the 512 bytes before are its header.
        size: bytes of its content.
        kind: "file", "folder", "link", or "special" for everything else.
    """

    name: str
    start: int
    size: int
    kind: str


def tar_members(read: Read, size: int, path: str) -> Iterator[TarMember]:
    """Yield the members of a tar file in their order.

    Args:
        read: returns the file's bytes from a position on.
        size: bytes of the file.
        path: names the file in error messages.

    Raises:
        InputFileError: it is no tar file, is compressed, damaged or cut off (raised while iterating).
    """
    unchecked, place = bytearray(), 0
    # what a header before the member's own says of it
    name: str | None = None
    records: dict[str, str] = {}
    for_all: dict[str, str] = {}
    while True:
        header = read(place, BLOCK)
        if len(header) < BLOCK:
            if place == 0:
                raise _no_tar(path, header)
            raise InputFileError(
                f"expected a whole tar file at {path}, got one without its end after {place} bytes; copy it again"
            )
        if header.count(0) == BLOCK:
            break
        if place == 0 and not sums_fit(header).all():
            raise _no_tar(path, header)
        unchecked += header
        if len(unchecked) >= _CHECKED_TOGETHER * BLOCK:
            _check(unchecked, path)
            unchecked.clear()
        kind, start = header[156:157], place + BLOCK
        length = _number(header[124:136])
        if "size" in records and kind in _FILES:
            length = int(records["size"]) if records["size"].isdecimal() else None
        if length is None or (kind in _FILES and start + length > size):
            _check(unchecked, path)
            cut = length is not None
            raise InputFileError(
                f"expected a whole tar file at {path}, got one that {'ends within' if cut else 'is damaged at'} the "
                f"member at byte {place}; copy it again"
            )
        if kind == _SPARSE:
            raise InputFileError(
                f"expected whole files in the tar file {path}, got a sparse one; pack it again without --sparse"
            )
        # links and folders have no content, whatever their size says
        content = 0 if kind in _LINKS or kind == _FOLDER else length
        if kind in (_LONG_NAME, _LONG_LINK) or kind in _RECORDS or kind in _ALL_RECORDS:
            if content > _MAX_NAME_BYTES:
                raise InputFileError(
                    f"expected a tar file at {path}, got a name of {content} bytes in it; pack it again"
                )
            raw = read(start, content)
            if kind == _LONG_NAME:
                name = _decoded(raw.split(b"\0", 1)[0])
            elif kind != _LONG_LINK:
                found = _records(raw, path)
                if kind in _RECORDS:
                    records = found
                else:
                    for_all |= found
        else:
            said = for_all | records if for_all or records else records
            own = said.get("path") or name
            if own is None:
                own = _decoded(header[:100].split(b"\0", 1)[0])
                if header[257:263] == b"ustar\0" and header[345]:
                    own = _decoded(header[345:500].split(b"\0", 1)[0]) + "/" + own
            if kind in _FILES:
                # an old format marks a folder so
                known = "folder" if own.endswith("/") else "file"
                if any(key.startswith("GNU.sparse") for key in said):
                    known = "special"
            else:
                known = "folder" if kind == _FOLDER else "link" if kind in _LINKS else "special"
            yield TarMember(own, start, content, known)
            name, records = None, {}
        place = start + -(-content // BLOCK) * BLOCK
    _check(unchecked, path)
    if read(place, _PADDING).strip(b"\0"):
        raise InputFileError(
            f"expected the end of the tar file {path} at byte {place}, got more behind it, as when archives are "
            "joined: pack them again as one"
        )


def _no_tar(path: str, start: bytes) -> InputFileError:
    for sign, program in COMPRESSED.items():
        if start.startswith(sign):
            return InputFileError(
                f"expected a tar file that is not compressed at {path}, got {program}: unpack it with {program} -d, "
                "because images in it are read at their places"
            )
    return InputFileError(f"expected a tar file at {path}, got something else; check the path or copy it again")


def _decoded(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _number(field: bytes) -> int | None:
    """Return a number in octal digits, or in base 256 as GNU writes large ones; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field[:11], 8)
    except ValueError:
        digits = _NUMBER.fullmatch(field)
        return None if digits is None else int(digits[1] or b"0", 8)


def _records(raw: bytes, path: str) -> dict[str, str]:
    """Return pax records, of which each is ``LENGTH KEY=VALUE`` and the end of a line."""
    found = {}
    at = 0
    while at < len(raw) and raw[at]:
        digits, space, _ = raw[at : at + 20].partition(b" ")
        end = at + int(digits) if space and digits.isdigit() else 0
        key, sign, value = raw[at + len(digits) + 1 : end - 1].partition(b"=")
        if not sign or end > len(raw) or raw[end - 1 : end] != b"\n":
            raise InputFileError(f"expected a tar file at {path}, got damaged pax records in it; copy it again")
        found[_decoded(key)] = _decoded(value)
        at = end
    return found


def sums_fit(headers: bytes | bytearray) -> np.ndarray:
    """Return for each header of 512 bytes whether its check sum fits: bool [n]."""
    raw = np.frombuffer(headers, np.uint8).reshape(-1, BLOCK)
    field = raw[:, 148:156]
    # the sum counts its own field as spaces; some programs have summed bytes with a sign
    total = raw.sum(1, dtype=np.int64) - field.sum(1, dtype=np.int64) + 8 * 32
    signed = total - 256 * ((raw >= 128).sum(1) - (field >= 128).sum(1))
    said = np.array([-1 if (n := _number(bytes(row) + b"    ")) is None else n for row in field], np.int64)
    return (said == total) | (said == signed)


def _check(headers: bytearray, path: str) -> None:
    if headers and not sums_fit(headers).all():
        raise InputFileError(f"expected a whole tar file at {path}, got one with a damaged header; copy it again")


def is_tar(start: bytes) -> bool:
    """Return whether a file that begins with these 512 bytes is a tar file."""
    return len(start) >= BLOCK and start[0] != 0 and bool(sums_fit(start[:BLOCK]).all())
