"""Order the classes of a folder or zip file, and with them the labels of its images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmem.data.decoding import Skipped
from fastmem.data.listing import NO_CLASS_FOLDER, SPLIT_NAMES, regular
from fastmem.errors import InputFileError, UsageError

# a larger file is no list of class names: a million of them take less
MAX_LIST_BYTES = 64 * 2**20
# a larger label without class names is taken for a mistake, because every label up to it becomes a class
MAX_UNNAMED_CLASSES = 1_000_000
# a line of the class list in ImageNet's Kaggle release: "n01440764 tench, Tinca tinca"
_SYNSET_LINE = re.compile(r"(n\d{8})\s+\S.*")

# class folder names in label order, or the path of a text file with one name per line
Classes = str | os.PathLike[str] | Sequence[str]


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
        UsageError: no image lies in a class folder, a class folder has no image and no order is given, or ``classes``
            lacks a class folder or names one twice.
    """
    if not any(found.values()):
        stray = sum(file.reason == NO_CLASS_FOLDER for file in skipped)
        if stray:
            lie = "1 image that lies" if stray == 1 else f"{stray} images that lie"
            raise UsageError(
                f"expected one folder of images per class in {where}, got {lie} in no class folder: put the images of "
                "every class into a folder of its own, as CLASS/NAME.png, or name the split that holds the class "
                'folders ("" for the folder itself)'
            )
        raise UsageError(
            f"expected one folder of images per class in {where}, got {len(found)} folders without an image"
            f"{_first(skipped)}; "
            'arrange it as CLASS/NAME.png, or name the split that holds the class folders ("" for the folder itself)'
        )
    if guess and found.keys() <= SPLIT_NAMES:
        raise UsageError(
            f"expected class folders in {where}, got what look like splits ({', '.join(sorted(found))}); "
            'name the split to use, or "" if these are classes'
        )
    filled = sorted(owner for owner, names in found.items() if names)
    if classes is None:
        empty = sorted(found.keys() - set(filled))
        if empty:
            others = f" and {len(empty) - 1} others" if len(empty) > 1 else ""
            inside = [file for file in skipped if file.name.startswith(f"{empty[0]}/")]
            raise UsageError(
                f"expected an image in every class folder of {where}, got none in {empty[0]!r}{others}{_first(inside)}"
                ": each would take a label and move those after it, so remove what is no class, or give the class "
                "order (--classes FILE)"
            )
        ordered = tuple(filled)
    else:
        ordered = _class_order(classes, filled)
    missing = sorted(set(filled) - set(ordered))
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


def numbered_classes(
    present: Sequence[int], stored: Sequence[str] | None, classes: Classes | None, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the class name of every number, and the class names in label order, where labels are stored as numbers.

    Args:
        present: numbers of the classes that have images, from 0.
        stored: the names that are stored with the numbers; None for the numbers themselves as text.
        classes: class names in label order, or a text file with one per line; None for the order of the numbers. Where
            it has none of the stored names, it names the numbers by position.
        where: the files, named in error messages.

    Raises:
        InputFileError: the text file cannot be read, or a number has no name.
        UsageError: ``classes`` has some of the stored names only, or too few names, or names one twice.
    """
    highest = max(present, default=0)
    if stored is None and highest >= MAX_UNNAMED_CLASSES:
        raise UsageError(f"expected labels below {MAX_UNNAMED_CLASSES} in {where}, got {highest}; number from 0")
    names = tuple(map(str, range(highest + 1))) if stored is None else tuple(stored)
    if highest >= len(names):
        raise InputFileError(
            f"expected labels below {len(names)}, the number of class names in {where}, got {highest}; make it again"
        )
    if classes is None:
        # equal or empty names would put two classes into one
        if len(set(names)) < len(names) or "" in names:
            raise InputFileError(f"expected a different name for every class in {where}, got some twice; make it again")
        return names, names
    used = [names[number] for number in present]
    ordered = _class_order(classes, used)
    missing = sorted(set(used) - set(ordered))
    if not missing:
        return names, ordered
    if set(names) & set(ordered):
        raise UsageError(
            f"expected every class of {where} in the class order, got {missing[0]!r} and {len(missing) - 1} others "
            "that are not in it; add them"
        )
    if highest >= len(ordered) or (stored is not None and len(ordered) != len(names)):
        raise UsageError(
            f"expected a class order that names the {len(names)} classes of {where} by their numbers, got "
            f"{len(ordered)} names; give one for each"
        )
    return ordered, ordered


def _first(skipped: Sequence[Skipped]) -> str:
    return f" ({skipped[0].name}: {skipped[0].reason})" if skipped else ""


def _class_order(classes: Classes, present: Sequence[str]) -> tuple[str, ...]:
    ordered = _listed(Path(classes), present) if isinstance(classes, (str, os.PathLike)) else tuple(classes)
    # an empty or repeated name would shift the labels of all classes after it
    seen = {""}
    for place, name in enumerate(ordered, 1):
        if not isinstance(name, str) or name in seen:
            raise UsageError(
                f"expected a different class folder name at every place of the class order, got {name!r} at place "
                f"{place}; remove what is empty or repeated"
            )
        seen.add(name)
    return ordered


def _listed(path: Path, present: Sequence[str]) -> tuple[str, ...]:
    """Return the class folder names in a text file; ``present`` are those that the images lie in."""
    try:
        with open(path, "rb", opener=regular) as file:
            content = file.read(MAX_LIST_BYTES + 1)
        if len(content) > MAX_LIST_BYTES:
            raise ValueError(f"more than {MAX_LIST_BYTES} bytes")
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("a zero byte, as in UTF-16; save it as UTF-8")
    except UnicodeDecodeError as error:
        raise _no_list(path, f"bytes that are not UTF-8 from {error.start} on; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise _no_list(path, f"{getattr(error, 'strerror', None) or error}; check the path") from error
    # not splitlines(), because a name may hold the rarer characters at which it ends a line
    lines = tuple(line.strip() for line in re.split("\r\n|\n|\r", text.rstrip()))
    synsets = [_SYNSET_LINE.fullmatch(line) for line in lines]
    if all(synsets) and not set(lines) & set(present):
        return tuple(line.split(maxsplit=1)[0] for line in lines)
    return lines


def _no_list(path: Path, got: str) -> InputFileError:
    return InputFileError(f"expected a text file with one class folder name per line at {path}, got {got}")
