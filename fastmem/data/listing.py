"""List the images of a folder or a zip file by class, with the files that are left out and the reason for each."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmem.data.decoding import SUFFIXES, Skipped
from fastmem.errors import InputFileError, UsageError

# a larger file in a zip is left out, because it would be unpacked into memory
MAX_ENTRY_BYTES = 256 * 2**20
# folders of these names are taken for parts of a data set, not for classes
_SPLIT_NAMES = frozenset(("train", "val", "valid", "validation", "test", "heldout"))
_NO_CLASS_FOLDER = "not in a class folder"

# class folder names in label order, or the path of a text file with one name per line
Classes = str | os.PathLike[str] | Sequence[str]


def no_split(split: str, where: Path, present: Sequence[str]) -> str:
    """Return the error message for a split that is not among the folders ``present`` in ``where``."""
    return (
        f"expected a split {split!r} in {where}, got the folders {', '.join(present[:8]) or 'none'}; "
        'give one of them, or "" where the class folders lie there themselves'
    )


def _refusal(name: str) -> str | None:
    suffix = os.path.splitext(name)[1].lower()
    return None if suffix in SUFFIXES else f"not an image file ({suffix or 'no'} extension)"


def list_folder(folder: Path) -> tuple[dict[str, list[str]], list[Skipped]]:
    """Return the image names by class folder, and the files that are left out.

    A name is a path below the class folder. Links are followed, except to a folder that contains the link.

    Raises:
        InputFileError: a folder cannot be listed.
    """
    found: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    # folders still to list: path, class (None for the top folder), and path below the class folder
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
                reason = _refusal(entry.name)
                if reason is None and owner is not None:
                    found[owner].append(prefix + entry.name)
                elif reason is None:
                    reason = _NO_CLASS_FOLDER
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
    """Open a zip file for reading.

    Raises:
        InputFileError: the file is missing or damaged.
    """
    if not path.exists():
        raise InputFileError(f"expected a zip file of images at {path}, got nothing there; check the path")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, struct.error) as error:
        raise InputFileError(
            f"expected a zip file of images at {path}, got one that cannot be read ({error}); copy it again"
        ) from error


def zip_prefix(entries: list[zipfile.ZipInfo], split: str | None, path: Path) -> str:
    """Return the folders in a zip file that hold the class folders, as ``[top folder/][split/]``.

    ``entries`` are the zip's contents. ``split`` is None for ``train`` where there is one, and ``""`` for no split.
    ``path`` names the zip in the error message.

    Raises:
        UsageError: the zip has no such split.
    """
    images = [entry.filename for entry in entries if not _hidden(entry.filename) and not _refusal(entry.filename)]
    tops = sorted({name.split("/", 1)[0] for name in images if "/" in name})
    # a single top folder is a class if images lie directly in it, and else it just encloses the class folders
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
    # the zips that macOS makes hold a second, hidden file with the metadata of every file
    return name.startswith((".", "__MACOSX/")) or "/." in name


def list_zip(entries: list[zipfile.ZipInfo], prefix: str) -> tuple[dict[str, list[str]], list[Skipped]]:
    """Return the image names by class folder, and the files left out, among the entries that start with ``prefix``."""
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
            reason = _NO_CLASS_FOLDER
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
    found: dict[str, list[str]], skipped: Sequence[Skipped], classes: Classes | None, where: str, *, guess: bool
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Sort images by label and name; return names ``class/name`` [N], labels int64 [N] and the class names.

    Args:
        found: image names by class folder.
        skipped: files that were left out, so that the message can count the images in no class folder.
        classes: class folder names in label order, or a text file with one per line; None for sorted folder names.
        where: the folder or zip file, named in error messages.
        guess: refuse class folders that are all named like splits, because no split was asked for.

    Raises:
        InputFileError: the text file cannot be read.
        UsageError: no image lies in a class folder, or ``classes`` lacks a class folder or names one twice.
    """
    if not any(found.values()):
        stray = sum(file.reason == _NO_CLASS_FOLDER for file in skipped)
        if stray:
            lie = "1 image that lies" if stray == 1 else f"{stray} images that lie"
            raise UsageError(
                f"expected one folder of images per class in {where}, got {lie} in no class folder: put the images of "
                "every class into a folder of its own, as CLASS/NAME.png, or name the split that holds the class "
                'folders ("" for the folder itself)'
            )
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
    # an empty or repeated name would shift the labels of all classes after it
    seen = {""}
    for place, name in enumerate(ordered, 1):
        if name in seen:
            raise UsageError(
                f"expected a different class folder name at every place of the class order, got {name!r} at place "
                f"{place}; remove what is empty or repeated"
            )
        seen.add(name)
    return ordered
