"""Where fastmem keeps weights, indexes, features and tokens between runs."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Folder of weights and caches: the environment variable ``FASTMEM_HOME``, else ``~/.cache/fastmem``."""
    return Path(os.environ.get("FASTMEM_HOME") or Path.home() / ".cache" / "fastmem").expanduser()
