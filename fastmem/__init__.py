"""fastmem: finds memorised training images in image autoregressive models, and the single units that hold them.

The names below load on first use; ``import fastmem`` itself loads neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmem.data.sources import ArraySource, FolderSource, ZipSource, embedded_source
    from fastmem.errors import FastmemError, InputFileError, UsageError
    from fastmem.models.checkpoints import assemble, load_model
    from fastmem.models.registry import model_names
    from fastmem.scoring import ScoreResult, responses, score
    from fastmem.stats import UnitStats

__version__ = "0.1.0"

_HOMES = {
    "ArraySource": "fastmem.data.sources",
    "FastmemError": "fastmem.errors",
    "FolderSource": "fastmem.data.sources",
    "InputFileError": "fastmem.errors",
    "ScoreResult": "fastmem.scoring",
    "UnitStats": "fastmem.stats",
    "UsageError": "fastmem.errors",
    "ZipSource": "fastmem.data.sources",
    "assemble": "fastmem.models.checkpoints",
    "embedded_source": "fastmem.data.sources",
    "load_model": "fastmem.models.checkpoints",
    "model_names": "fastmem.models.registry",
    "responses": "fastmem.scoring",
    "score": "fastmem.scoring",
}

__all__ = [
    "ArraySource",
    "FastmemError",
    "FolderSource",
    "InputFileError",
    "ScoreResult",
    "UnitStats",
    "UsageError",
    "ZipSource",
    "assemble",
    "embedded_source",
    "load_model",
    "model_names",
    "responses",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmem' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
