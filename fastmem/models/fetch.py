"""Downloading the official files into ``FASTMEM_HOME``, and checking the files that are there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastmem.models.checkpoints import ROLES, read_weights
from fastmem.models.hub import download
from fastmem.models.registry import ModelEntry, OfficialFile


def fetch(entry: ModelEntry, note: Callable[[str], None]) -> list[Path]:
    """Download a model's files where they are missing, and check every entry's name and shape.

    A file that the hub's cache holds stays there and is used. Every step is told in one sentence to ``note``. Returns
    the files of the generator and the tokenizer.

    Raises:
        InputFileError: a file cannot be downloaded or is damaged.
        UsageError: a file is another model's.
    """
    paths = [_fetch_file(file, note) for file in (entry.generator_file, entry.tokenizer_file)]
    for role, path in zip(ROLES, paths, strict=True):
        state = read_weights(entry, role, path)
        note(f"{path}: {len(state)} entries, all names and shapes fit {entry.name}")
    return paths


def _fetch_file(file: OfficialFile, note: Callable[[str], None]) -> Path:
    path = file.path
    if os.path.isfile(path) or file.repository is None:
        return path
    note(f"downloading {file.name} from {file.repository} to {path.parent}")
    return download(file.repository, file.name, path)
