"""The content of checkpoint files: torch's two formats, safetensors, and checkpoints in several parts with an index.

Checkpoints are untrusted files, so only tensors are read from them and nothing in them is ever run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_bounded
from fastmem.models.file_kinds import AGAIN, WEIGHTS_ALONE, Kind, tell_kind

# how torch's refusal of a pickle names what is in the way
REFUSED_CLASS = re.compile(r"GLOBAL ([\w.]+)")
# an archive that would unpack to more than this many times its size, and more than 1 GiB, is not read
MOST_UNPACKED = 64
INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")
FILE_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
NAMES_SHOWN = 3


@dataclass(frozen=True)
class WeightFile:
    """The content of a checkpoint file, and the key in it that a user chose, None for any."""

    path: Path
    key: str | None
    content: object


def read_weight_file(given: Path) -> WeightFile:
    """Read a checkpoint, with tensors that are memory-mapped where the format allows.

    ``given`` is a file, an index of a checkpoint in parts, a folder that holds one of these, or FILE#KEY.

    Raises:
        InputFileError: the file is missing, damaged, or holds something other than tensors.
        UsageError: a folder holds several checkpoints.
    """
    path, key = _split_key(given)
    if os.path.isdir(path):
        path = _find_in_folder(path)
    kind = tell_kind(path)
    return WeightFile(path, key, _read_parts(path) if kind is Kind.INDEX else _read_file(path, kind))


def read_one_file(path: Path) -> object:
    """Read a checkpoint that is one file. Raises: InputFileError where it is missing, damaged or something else."""
    kind = tell_kind(path)
    if kind is Kind.INDEX:
        raise InputFileError(
            f"expected a .bin, .pth or .safetensors checkpoint in {path}, got a JSON document: give the checkpoint "
            "in its place"
        )
    return _read_file(path, kind)


def _split_key(given: Path) -> tuple[Path, str | None]:
    text = str(given)
    # a file may have the sign in its own name
    if not os.path.lexists(text):
        for at in range(len(text) - 1, 0, -1):
            if text[at] == "#" and os.path.lexists(text[:at]):
                return Path(text[:at]), text[at + 1 :]
    return given, None


def _find_in_folder(folder: Path) -> Path:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputFileError(
            f"expected a folder that can be read at {folder}, got {error.strerror}: check the path"
        ) from error
    found = [name for name in names if name.endswith(INDEX_ENDINGS)]
    found = found or [name for name in names if name.endswith(FILE_ENDINGS)]
    if not found:
        raise InputFileError(f"expected a checkpoint in the folder {folder}, got none: name the file")
    if len(found) > 1:
        raise UsageError(
            f"expected one checkpoint in the folder {folder}, got {len(found)} ({_some(found)}): name the one to take"
        )
    return folder / found[0]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, ..."


def _read_file(path: Path, kind: Kind) -> object:
    try:
        # torch warns of checks that it makes, about which the user can do nothing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_file(path) if kind is Kind.SAFETENSORS else _load_torch(path, kind)
    # on a damaged file these libraries raise exceptions of many kinds
    except Exception as error:
        refused = isinstance(error, pickle.UnpicklingError)
        named = REFUSED_CLASS.search(str(error)) if refused else None
        if named:
            raise InputFileError(
                f"expected plain tensors in {path}, got {named[1]}, which is not loaded because it could run code: "
                f"{WEIGHTS_ALONE}"
            ) from error
        # torch's own text would advise to load the file unsafely
        detail = "not plain tensors" if refused else " ".join(str(error).split())[:160]
        raise InputFileError(
            f"expected a whole .bin, .pth or .safetensors checkpoint of plain tensors in {path}, got one that cannot "
            f"be read ({type(error).__name__}: {detail}): {AGAIN}"
        ) from error


def _load_torch(path: Path, kind: Kind) -> object:
    if kind is Kind.LEGACY:
        # no archive, so it cannot be mapped
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_members(archive, path.stat().st_size)
    # torch maps a tensor from where its member begins, whatever the member's length and compression
    mapped = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    # by this suffix torch would take the file for another format
    mapped = mapped and path.suffix != ".safetensors"
    needed: Counter[int] = Counter()

    def place(storage: Any, location: str) -> Any:
        needed[storage.nbytes()] += 1
        return storage

    if mapped:
        content = torch.load(path, map_location=place, weights_only=True, mmap=True)
    else:
        with open(path, "rb") as file:
            content = torch.load(file, map_location=place, weights_only=True)
    if needed - Counter(member.file_size for member in members):
        raise ValueError("a tensor is larger than its data")
    return content


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Check the checksums of an archive's members, where it has them; torch itself checks none.

    Raises: ValueError where so little data of ``size`` bytes would unpack to so much, or two members have one name;
    zipfile.BadZipFile where a member's checksum is wrong.
    """
    members = archive.infolist()
    if sum(member.file_size for member in members) > max(MOST_UNPACKED * size, 2**30):
        raise ValueError(f"it would unpack to more than {MOST_UNPACKED} times its size")
    if len(set(archive.namelist())) < len(members):
        raise ValueError("two members have one name")
    for member in members:
        # torch may be told to write no checksums, and then writes 0
        if member.CRC:
            with archive.open(member) as file:
                while file.read(2**20):
                    pass


def _read_parts(path: Path) -> dict[str, Tensor]:
    """Return the entries of a checkpoint in parts, whose index is at ``path``."""
    by_part: defaultdict[str, set[str]] = defaultdict(set)
    for name, part in _read_index(path).items():
        by_part[part].add(name)
    for part in by_part:
        if part in ("", ".", "..") or any(sign in part for sign in "/\\\0"):
            raise InputFileError(
                f"expected names of files that lie beside the index {path}, got {part[:80]!r}: {AGAIN}"
            )
        if not os.path.isfile(path.parent / part):
            raise InputFileError(
                f"expected all {len(by_part)} parts of the checkpoint beside its index {path}, got no {part[:80]}: "
                "fetch what is missing"
            )
    entries: dict[str, Tensor] = {}
    for part, names in by_part.items():
        file = path.parent / part
        content = read_one_file(file)
        found: Mapping[object, Tensor] = content if isinstance(content, Mapping) else {}
        missing, more = sorted(names - found.keys()), sorted(str(name) for name in found.keys() - names)
        if missing or more:
            listed = ((missing, "missing"), (more, "unlisted"))
            got = " and ".join(f"{len(those)} {kind} ({_some(those)})" for those, kind in listed if those)
            raise InputFileError(
                f"expected the entries in {file} that the index {path.name} lists, got {got}: {AGAIN}, the index and "
                "all parts"
            )
        entries.update((name, found[name]) for name in names)
    return entries


def _read_index(path: Path) -> dict[str, str]:
    """Return the part that holds each entry, by the entry's name."""
    content = read_bounded(path)
    try:
        # a name that is listed twice would stand for one of two parts
        document = json.loads(content, object_pairs_hook=_without_repeats)
        found = document.get("weight_map") if isinstance(document, dict) else None
        if found is None:
            raise InputFileError(
                f"expected a checkpoint, or the index of one in parts, in {path}, got a JSON document without "
                "weight_map: give the checkpoint in its place"
            )
        weight_map: dict[str, str] = msgspec.convert(found, dict[str, str])
    # a document that is nested too deep ends in a RecursionError
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        detail = " ".join(str(error).split())[:120]
        raise InputFileError(
            f"expected the index of a checkpoint in {path}, got a damaged one ({detail}): {AGAIN}"
        ) from error
    if not weight_map:
        raise InputFileError(f"expected the index of a checkpoint in {path}, got one without entries: {AGAIN}")
    return weight_map


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found
