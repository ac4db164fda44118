"""Files of Hugging Face's hub: those that its cache holds, and downloads."""

from __future__ import annotations

import os
from pathlib import Path

from fastmem.errors import InputFileError

# characters of a failed download's reason that are shown
REASON = 160


def hub_cache() -> Path | None:
    """The folder of the hub's cache, by the environment variables that set it; None without a home folder."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if named := os.environ.get(variable):
            return _expanded(named)
    if named := os.environ.get("HF_HOME"):
        return _expanded(os.path.join(named, "hub"))
    above = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return _expanded(os.path.join(above, "huggingface", "hub"))


def _expanded(name: str) -> Path | None:
    folder = os.path.expanduser(os.path.expandvars(name))
    return None if folder.startswith("~") else Path(folder)


def find_in_hub_cache(repository: str, name: str) -> Path | None:
    """A file of the newest state of a repository that the hub's cache knows, or None."""
    cache = hub_cache()
    # the hub's package is loaded only where the cache knows the repository
    if cache is None or not os.path.isdir(cache / f"models--{repository.replace('/', '--')}"):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, name, cache_dir=cache)
    # the cache may be damaged, or another user's
    except (OSError, ValueError):
        return None
    return Path(found) if isinstance(found, str) and os.path.isfile(found) else None


def is_offline() -> bool:
    """Whether the hub's own variables forbid the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(repository: str, name: str, path: Path) -> Path:
    """Download a repository's file to ``path``, whose name is ``name``.

    Raises: InputFileError where the network is forbidden, or the download fails.
    """
    if is_offline():
        raise InputFileError(
            f"expected {name} at {path} or in the hub's cache {hub_cache()}, as HF_HUB_OFFLINE is set, got no such "
            f"file: unset HF_HUB_OFFLINE, or download it from {repository} elsewhere and put it at {path}"
        )
    # heavy, and only needed here
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    # it would log every attempt to connect
    logging.set_verbosity_error()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(hf_hub_download(repository, name, local_dir=path.parent))
    # the hub's releases differ in the HTTP library they use, and so in what a failed connection raises
    except Exception as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        reason = " ".join(str(cause).split())[:REASON] or type(cause).__name__
        raise InputFileError(
            f"expected to download {name} from the Hugging Face repository {repository}, got no file "
            f"({reason}): download it elsewhere and put it at {path}"
        ) from error
