"""Downloading the official files into ``FASTMEM_HOME``, and checking the files that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastmem.errors import InputFileError
from fastmem.models.checkpoints import build_networks, check_state, read_state, shapes_of
from fastmem.models.registry import ModelEntry, OfficialFile


def fetch(entry: ModelEntry, note: Callable[[str], None]) -> list[Path]:
    """Download a model's files where they are missing, and check every entry's name and shape.

    Every step is told in one sentence to ``note``. Returns the files of the generator and the tokenizer.

    Raises:
        InputFileError: a file cannot be downloaded or is damaged.
        UsageError: a file is another model's.
    """
    paths = [_fetch_file(file, note) for file in (entry.generator_file, entry.tokenizer_file)]
    states = [read_state(path) for path in paths]
    with torch.device("meta"):
        networks = build_networks(entry, shapes_of(states[0]))
    for network, state, path in zip(networks, states, paths, strict=True):
        check_state(entry, network, state, path)
        note(f"{path}: {len(state)} entries, all names and shapes fit {entry.name}")
    return paths


def _fetch_file(file: OfficialFile, note: Callable[[str], None]) -> Path:
    path = file.path
    if path.is_file() or file.repository is None:
        return path
    # heavy, and only needed here
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    # it would log every attempt to connect
    logging.set_verbosity_error()
    note(f"downloading {file.name} from {file.repository} to {path.parent}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(hf_hub_download(file.repository, file.name, local_dir=path.parent))
    # the hub's releases differ in the HTTP library they use, and so in what a failed connection raises
    except Exception as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        reason = " ".join(str(cause).split())[:120] or type(cause).__name__
        raise InputFileError(
            f"expected to download {file.name} from the Hugging Face repository {file.repository}, got no file "
            f"({reason}): download it elsewhere and put it at {path}"
        ) from error
