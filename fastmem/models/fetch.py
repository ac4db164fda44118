"""Downloading the official files into ``FASTMEM_HOME`` and checking what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastmem.errors import InputFileError
from fastmem.models.checkpoints import build_networks, check_state, read_state, shapes_of
from fastmem.models.registry import ModelEntry, OfficialFile


def fetch(entry: ModelEntry, note: Callable[[str], None]) -> list[Path]:
    """Download a model's files where they are missing, and check every entry's name and shape.

    note: told one sentence per step.

    Raises: InputFileError where a file cannot be had or is damaged; UsageError where it is another model's.
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
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    note(f"downloading {file.name} from {file.repository} to {path.parent}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(hf_hub_download(file.repository, file.name, local_dir=path.parent))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputFileError(
            f"expected to download {file.name} from the Hugging Face repository {file.repository}, got no file "
            f"({reason}): download it elsewhere and put it at {path}"
        ) from error
