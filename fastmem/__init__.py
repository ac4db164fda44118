"""fastmem: finds memorised training images in image autoregressive models, and the single units that hold them.

The names below load on first use; ``import fastmem`` itself loads neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmem.data.sources import ArraySource, FolderSource, ZipSource, embedded_source
    from fastmem.errors import FastmemError, InputFileError, UsageError
    from fastmem.mitigation.attribution import attribution
    from fastmem.mitigation.edit_file import EditPlan
    from fastmem.mitigation.scaling import Edit, scale_units
    from fastmem.models.checkpoints import assemble, load_model
    from fastmem.models.registry import model_names
    from fastmem.ranking.gap import gap
    from fastmem.ranking.ownership import owners
    from fastmem.ranking.reliability import reliability
    from fastmem.ranking.selection import Selection, select
    from fastmem.scoring import ScoreResult, responses, score
    from fastmem.scoring.membership import membership
    from fastmem.stats import UnitStats

__version__ = "0.1.0"

_HOMES = {
    "ArraySource": "fastmem.data.sources",
    "Edit": "fastmem.mitigation.scaling",
    "EditPlan": "fastmem.mitigation.edit_file",
    "FastmemError": "fastmem.errors",
    "FolderSource": "fastmem.data.sources",
    "InputFileError": "fastmem.errors",
    "ScoreResult": "fastmem.scoring",
    "Selection": "fastmem.ranking.selection",
    "UnitStats": "fastmem.stats",
    "UsageError": "fastmem.errors",
    "ZipSource": "fastmem.data.sources",
    "assemble": "fastmem.models.checkpoints",
    "attribution": "fastmem.mitigation.attribution",
    "embedded_source": "fastmem.data.sources",
    "gap": "fastmem.ranking.gap",
    "load_model": "fastmem.models.checkpoints",
    "membership": "fastmem.scoring.membership",
    "model_names": "fastmem.models.registry",
    "owners": "fastmem.ranking.ownership",
    "reliability": "fastmem.ranking.reliability",
    "responses": "fastmem.scoring",
    "scale_units": "fastmem.mitigation.scaling",
    "score": "fastmem.scoring",
    "select": "fastmem.ranking.selection",
}

__all__ = [
    "ArraySource",
    "Edit",
    "EditPlan",
    "FastmemError",
    "FolderSource",
    "InputFileError",
    "ScoreResult",
    "Selection",
    "UnitStats",
    "UsageError",
    "ZipSource",
    "assemble",
    "attribution",
    "embedded_source",
    "gap",
    "load_model",
    "membership",
    "model_names",
    "owners",
    "reliability",
    "responses",
    "scale_units",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmem' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
