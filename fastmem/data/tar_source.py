"""Images in tar files, as in webdataset shards, read in place and never unpacked to disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import msgspec
import numpy as np

from fastmem.data.class_order import Classes, in_label_order, numbered_classes
from fastmem.data.decoding import DamagedImage, Skipped
from fastmem.data.listing import (
    LATER,
    MAX_ENTRY_BYTES,
    OUTSIDE,
    Member,
    is_text,
    list_members,
    members_prefix,
    refusal,
)
from fastmem.data.sharded import ShardedSource, shards_description
from fastmem.data.shards import Pattern, Shards, is_remote
from fastmem.data.system_files import is_system_name
from fastmem.data.tar_listing import BLOCK, Read, sums_fit, tar_members
from fastmem.errors import UsageError

# keys of a label in the JSON document beside an image
_KEYS = ("label", "cls", "class", "class_name")
# larger ones hold no label that is looked for
_MAX_LABEL_BYTES = 2**16
_NUMBER = re.compile(r"[+-]?\d{1,18}")
NO_LABEL = "no label beside it"
# remote shards are listed side by side, because that is mostly waiting
_SIDE_BY_SIDE = 8

Label = int | str | None


@dataclass
class _Listed:
    """The members of shards.

    Attributes:
        members: files and folders; a member's number is its place in the lists below.
        shard, start, size: where each one's content lies.
        beside: label of each in a file of its own beside it; None where there is none.
        inside: label of each in a JSON document beside it.
    """

    members: list[Member] = field(default_factory=list)
    shard: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    beside: list[Label] = field(default_factory=list)
    inside: list[Label] = field(default_factory=list)


class TarSource(ShardedSource):
    """Images in tar files: one folder per class as in a folder of images, or webdataset samples with labels.

    In a sample the files have one name and different endings: the image, and ``.cls`` with its label, a number or the
    name of a class, or ``.json`` with an entry "label", "cls", "class" or "class_name". Where no image has such a label
    the class is the folder that the image is in. The image's name is its path, without the folder of its class.

    Args:
        pattern: paths, local or fsspec's, with ``{000..146}``, wildcards, or ``::`` between them; or a list of paths.
        split: folder in the tar that holds the class folders, ``""`` for none; by default ``train`` where there is one.
        classes: class names in label order, or a text file with one per line. Numbers as labels are positions in it, or
            names if it has them. By default names are sorted, and numbers keep their order.

    Raises:
        InputFileError: a shard or the text file of classes is missing or damaged.
        UsageError: there is no such split, no image with a class, a name twice, or ``classes`` does not fit.
    """

    def __init__(self, pattern: Pattern, split: str | None = None, classes: Classes | None = None) -> None:
        self.shards = Shards(pattern)
        self.split = split
        listed = _Listed()
        first: dict[str, int] = {}
        for number, part in enumerate(_list_all(self.shards)):
            _append(listed, part, number, first, self.shards)
        del first
        description = shards_description("tar", self.shards)
        labels = listed.beside if any(label is not None for label in listed.beside) else listed.inside
        if any(label is not None for label in labels):
            if split:
                raise UsageError(
                    f"expected no split of {description}, whose images have labels beside them, got {split!r}; name "
                    "the shards of the split"
                )
            found, skipped, numbers, order = _by_label(listed.members, labels, classes, description)
            guess = False
        else:
            prefix = members_prefix(listed.members, split, description)
            description += f":{prefix[:-1]}" if prefix else ""
            found, skipped, numbers = list_members(listed.members, prefix)
            order, guess = classes, split is None
        names, of_class, ordered = in_label_order(found, skipped, order, description, guess=guess)
        at = np.array([numbers[name] for name in names], dtype=np.int64)
        self._shard = np.array(listed.shard, dtype=np.int32)[at]
        self._start, self._size = (np.array(values, dtype=np.int64)[at] for values in (listed.start, listed.size))
        super().__init__(pattern, names, of_class, ordered, skipped, description)

    def _stored_at(self, index: int) -> tuple[int, int]:
        return int(self._shard[index]), int(self._start[index])

    def _contents(self, indexes: Sequence[int]) -> Iterator[tuple[int, bytes | DamagedImage]]:
        for index in indexes:
            shard, start = self._stored_at(index)
            size, name = int(self._size[index]), str(self.names[index])
            try:
                raw = self.shards.read(shard, start - BLOCK, BLOCK + size)
            except OSError as error:
                yield index, DamagedImage(f"cannot be read: {error.strerror or error}", name)
                continue
            # a shard may have been exchanged for one of the same size
            if len(raw) < BLOCK + size or not sums_fit(raw[:BLOCK]).all():
                yield index, DamagedImage("not in the tar any more", name)
            else:
                yield index, raw[BLOCK:]


def _list_all(shards: Shards) -> Iterator[_Listed]:
    if not any(map(is_remote, shards.paths)):
        yield from (_list_shard(shards, number) for number in range(len(shards)))
        return
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        yield from pool.map(lambda number: _list_shard(shards, number), range(len(shards)))


def _reader(shards: Shards, number: int) -> Read:
    """Return a function that reads a shard from its begin to its end, in small pieces."""
    file = shards.file(number)
    if not is_remote(shards.paths[number]):
        handle = file.fileno()
        return lambda start, size: os.pread(handle, size, start)

    def read(start: int, size: int) -> bytes:
        # remote files are read ahead in large pieces
        file.seek(start)
        return file.read(size)

    return read


def _list_shard(shards: Shards, number: int) -> _Listed:
    """Return the members of one shard, with their labels."""
    read, path = _reader(shards, number), shards.paths[number]
    listed = _Listed()
    beside: dict[str, Label] = {}
    inside: dict[str, Label] = {}
    stems: list[str] = []
    for member in tar_members(read, shards.size(number), path):
        name, is_folder = member.name, member.kind == "folder"
        outside = False
        if name.startswith(("/", "./")) or "//" in name or "/." in name or name.endswith("/"):
            parts = [part for part in name.split("/") if part not in ("", ".")]
            outside = name.startswith("/") or ".." in parts
            name = member.name if outside else "/".join(parts)
        elif name.startswith("..") and name.split("/", 1)[0] == "..":
            outside = True
        folder, _, last = name.rpartition("/")
        if not name or (not outside and (is_system_name(last) or _is_system_folder(folder))):
            continue
        reason = None
        if outside:
            reason = OUTSIDE
        elif not is_folder:
            stem, dot, ending = name.rpartition(".")
            if ending in ("cls", "json") and dot and member.kind == "file" and member.size <= _MAX_LABEL_BYTES:
                content = read(member.start, member.size)
                label = _label(content.decode(errors="replace")) if ending == "cls" else _label_in(content)
                (beside if ending == "cls" else inside)[stem] = label
                if label is not None:
                    continue
            reason = refusal(name)
            if not is_text(name):
                name, reason = name.encode(errors="backslashreplace").decode(), "the name is not UTF-8"
            elif reason is None and member.kind != "file":
                reason = "a link" if member.kind == "link" else "not a regular file"
            elif reason is None and member.size > MAX_ENTRY_BYTES:
                reason = f"huge: {member.size} bytes, the limit is {MAX_ENTRY_BYTES}"
        listed.members.append(Member(name, 0, is_folder, reason))
        listed.start.append(member.start)
        listed.size.append(member.size)
        stems.append("" if reason or is_folder else stem)
    listed.beside = [beside.get(stem) for stem in stems]
    listed.inside = [inside.get(stem) for stem in stems]
    return listed


@lru_cache(4096)
def _is_system_folder(path: str) -> bool:
    return any(is_system_name(part) for part in path.split("/") if part)


def _append(listed: _Listed, part: _Listed, shard: int, first: dict[str, int], shards: Shards) -> None:
    """Add the members of one shard to those of the shards before it; ``first`` has where each image's name was met."""
    base = len(listed.members)
    for place, member in enumerate(part.members):
        number = base + place
        if member.refusal is None and not member.is_folder:
            before = first.get(member.name)
            if before is not None and before < base:
                raise UsageError(
                    f"expected every image once, got {member.name!r} in both {shards.paths[listed.shard[before]]} and "
                    f"{shards.paths[shard]}; names tell images apart, so name them anew or leave out one of the shards"
                )
            if before is not None:
                # as programs that unpack archives do it, the last one counts
                listed.members[before] = listed.members[before]._replace(refusal=LATER)
            first[member.name] = number
        listed.members.append(member._replace(number=number))
        listed.shard.append(shard)
    listed.start += part.start
    listed.size += part.size
    listed.beside += part.beside
    listed.inside += part.inside


@lru_cache(4096)
def _label(text: str) -> Label:
    """Return a label as a number or the name of a class; None where it is neither, or below 0."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return int(text) if int(text) >= 0 else None
    return text if text and text.isprintable() and "\ufffd" not in text else None


def _label_in(content: bytes) -> Label:
    try:
        document = msgspec.json.decode(content)
    # a document that is nested too deep ends in a RecursionError
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    for key in _KEYS:
        value = document.get(key)
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return _label(str(value))
    return None


def _by_label(
    members: Sequence[Member], labels: Sequence[Label], classes: Classes | None, where: str
) -> tuple[dict[str, list[str]], list[Skipped], dict[str, int], Classes | None]:
    """Return image names by class, files left out, the number of each image, and the class order."""
    present = {
        label for member, label in zip(members, labels, strict=True) if label is not None and member.refusal is None
    }
    numbers = [label for label in present if isinstance(label, int)]
    if numbers and len(numbers) < len(present):
        other = next(label for label in present if isinstance(label, str))
        raise UsageError(
            f"expected labels in {where} that are all numbers or all names, got {numbers[0]} and {other!r}; write them "
            "alike"
        )
    by_number: Sequence[str] = ()
    if numbers:
        by_number, classes = numbered_classes(sorted(numbers), None, classes, where)
    found: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    place: dict[str, int] = {}
    for member, label in zip(members, labels, strict=True):
        if member.is_folder:
            continue
        if member.refusal is not None or label is None:
            skipped.append(Skipped(member.name, member.refusal or NO_LABEL))
            continue
        owner = by_number[label] if isinstance(label, int) else label
        name = member.name.removeprefix(f"{owner}/")
        found.setdefault(owner, []).append(name)
        place[f"{owner}/{name}"] = member.number
    return found, sorted(skipped, key=lambda item: item.name), place, classes
