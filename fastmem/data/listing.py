"""Listing a folder or a zip file of images: what is where, what is skipped and why, and the order of the classes."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmem.data.decoding import SUFFIXES, Skipped
from fastmem.errors import InputFileError, UsageError

MAX_ENTRY_BYTES = 256 * 2**20
_SPLIT_NAMES = frozenset(("train", "val", "valid", "validation", "test", "heldout"))

Classes = str | os.PathLike[str] | Sequence[str]


def no_split(split: str, where: Path, present: Sequence[str]) -> str:
    return (
        f"expected a split {split!r} in {where}, got the folders {', '.join(present[:8]) or 'none'}; "
        'give one of them, or "" where the class folders lie there themselves'
    )


def _refusal(name: str) -> str | None:
    suffix = os.path.splitext(name)[1].lower()
    return None if suffix in SUFFIXES else f"not an image file ({suffix or 'no'} extension)"


def list_folder(folder: Path) -> tuple[dict[str, list[str]], list[Skipped]]:
    """Find {class: names} and what is skipped, following links but never in a circle."""
    found: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    # (folder, its class, what the names of its files start with)
    pending: list[tuple[str, str | None, str]] = [(str(folder), None, "")]
    while pending:
        place, owner, prefix = pending.pop()
        for entry in _entries(place):
            if entry.name.startswith("."):
                continue
            full = f"{owner}/{prefix}{entry.name}" if owner is not None else entry.name
            reason = None
            if not _is_text(entry.name):
                full = full.encode(errors="backslashreplace").decode()
                reason = "the name is not UTF-8"
            elif entry.is_dir():
                if entry.is_symlink() and _leads_back(entry.path):
                    reason = "a link to a folder that it is in"
                elif owner is None:
                    found[entry.name] = []
                    pending.append((entry.path, entry.name, ""))
                else:
                    pending.append((entry.path, owner, f"{prefix}{entry.name}/"))
            elif not entry.is_file():
                reason = "not a regular file"
            else:
                reason = _refusal(entry.name) or (None if owner is not None else "not in a class folder")
                if reason is None:
                    found[owner].append(prefix + entry.name)
            if reason is not None:
                skipped.append(Skipped(full, reason))
    return found, sorted(skipped, key=lambda item: item.name)


def _entries(place: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return list(entries)
    except OSError as error:
        raise InputFileError(
            f"expected a folder that can be listed at {place}, got {error.strerror}; check its permissions"
        ) from error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leads_back(link: str) -> bool:
    target = os.path.realpath(link)
    return any(os.path.realpath(parent) == target for parent in Path(link).absolute().parents)


def open_zip(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise InputFileError(f"expected a zip file of images at {path}, got nothing there; check the path")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, struct.error) as error:
        raise InputFileError(
            f"expected a zip file of images at {path}, got one that cannot be read ({error}); copy it again"
        ) from error


def zip_prefix(entries: list[zipfile.ZipInfo], split: str | None, path: Path) -> str:
    """Find what every image's entry starts with: [top folder/][split/]."""
    images = [entry.filename for entry in entries if not _hidden(entry.filename) and not _refusal(entry.filename)]
    tops = sorted({name.split("/", 1)[0] for name in images if "/" in name})
    # one folder around everything is a class, not a wrapping, when images lie directly in it
    wrapped = len(tops) == 1 and tops[0] not in _SPLIT_NAMES and all(name.count("/") > 1 for name in images)
    tried = ["", f"{tops[0]}/"] if wrapped else [""]
    wanted = "train" if split is None else split.strip("/.")
    if wanted:
        for start in tried:
            if any(name.startswith(f"{start}{wanted}/") for name in images):
                return f"{start}{wanted}/"
        if split:
            raise UsageError(no_split(split, path, tops))
    return tried[-1]


def _hidden(name: str) -> bool:
    # macOS adds a shadow of every file to the zips it makes
    return name.startswith((".", "__MACOSX/")) or "/." in name


def list_zip(entries: list[zipfile.ZipInfo], prefix: str) -> tuple[dict[str, list[str]], list[Skipped]]:
    """Find {class: names} and what is skipped among the entries below the prefix."""
    found: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    for entry in entries:
        if not entry.filename.startswith(prefix) or _hidden(entry.filename):
            continue
        full = entry.filename[len(prefix) :]
        owner, slash, name = full.partition("/")
        if owner and slash:
            found.setdefault(owner, [])
        if entry.is_dir():
            continue
        reason = _refusal(full)
        if reason is None and not slash:
            reason = "not in a class folder"
        elif reason is None and (not owner or "//" in full):
            reason = "an empty folder name in its path"
        elif reason is None and entry.file_size > MAX_ENTRY_BYTES:
            reason = f"huge: {entry.file_size} bytes, the limit is {MAX_ENTRY_BYTES}"
        if reason is None:
            found[owner].append(name)
        else:
            skipped.append(Skipped(full, reason))
    return found, sorted(skipped, key=lambda item: item.name)


def in_label_order(
    found: dict[str, list[str]], classes: Classes | None, where: str, *, guess: bool
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Order {class: names} by (label, name): names ``class/name`` [N], labels int64 [N], classes."""
    if not any(found.values()):
        raise UsageError(
            f"expected one folder of images per class in {where}, got {len(found)} folders without an image; "
            'arrange it as CLASS/NAME.png, or name the split that holds the class folders ("" for the folder itself)'
        )
    if guess and found.keys() <= _SPLIT_NAMES:
        raise UsageError(
            f"expected class folders in {where}, got what look like splits ({', '.join(sorted(found))}); "
            'name the split to use, or "" if these are classes'
        )
    ordered = tuple(sorted(found)) if classes is None else _class_order(classes)
    missing = sorted(found.keys() - set(ordered))
    if missing:
        raise UsageError(
            f"expected every class folder of {where} in the class order, got {missing[0]!r} and {len(missing) - 1} "
            "others that are not in it; add them or remove the folders"
        )
    per_class = [sorted(found.get(name, ())) for name in ordered]
    labels = np.repeat(np.arange(len(ordered), dtype=np.int64), [len(names) for names in per_class])
    return (
        [f"{label}/{name}" for label, names in zip(ordered, per_class, strict=True) for name in names],
        labels,
        ordered,
    )


def _class_order(classes: Classes) -> tuple[str, ...]:
    if isinstance(classes, (str, os.PathLike)):
        try:
            lines = Path(classes).read_text(encoding="utf-8-sig").rstrip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputFileError(
                f"expected a text file with one class folder name per line at {classes}, got {error}; check the path"
            ) from error
        ordered = tuple(line.strip() for line in lines)
    else:
        ordered = tuple(classes)
    # an empty or repeated line would move every label after it
    seen = {""}
    for place, name in enumerate(ordered, 1):
        if name in seen:
            raise UsageError(
                f"expected a different class folder name at every place of the class order, got {name!r} at place "
                f"{place}; remove what is empty or repeated"
            )
        seen.add(name)
    return ordered
