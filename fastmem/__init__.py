"""fastmem: finds memorised training images in image autoregressive models, and the single units that hold them.

The names below load on first use; ``import fastmem`` itself loads neither torch nor triton.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmem.data.sources import (
        ArraySource,
        FolderSource,
        ParquetSource,
        TarSource,
        TokenSource,
        ZipSource,
        embedded_source,
        open_source,
    )
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
    from fastmem.reporter import Reporter
    from fastmem.scoring.membership import membership
    from fastmem.scoring.score import ScoreResult, responses
    from fastmem.stages.evaluate import evaluate
    from fastmem.stages.extract import extract
    from fastmem.stages.index import index as index
    from fastmem.stages.merge import merge
    from fastmem.stages.mitigate import mitigate
    from fastmem.stages.opened_run import OpenedRun, open_run
    from fastmem.stages.options import SSCDOptions
    from fastmem.stages.report import report as report
    from fastmem.stages.score import score
    from fastmem.stages.status import status
    from fastmem.stages.sweep import sweep as sweep
    from fastmem.stats import UnitStats

__version__ = "0.1.0"

_HOMES = {
    "ArraySource": "fastmem.data.sources",
    "Edit": "fastmem.mitigation.scaling",
    "EditPlan": "fastmem.mitigation.edit_file",
    "FastmemError": "fastmem.errors",
    "FolderSource": "fastmem.data.sources",
    "InputFileError": "fastmem.errors",
    "OpenedRun": "fastmem.stages.opened_run",
    "ParquetSource": "fastmem.data.sources",
    "Reporter": "fastmem.reporter",
    "SSCDOptions": "fastmem.stages.options",
    "ScoreResult": "fastmem.scoring.score",
    "Selection": "fastmem.ranking.selection",
    "TarSource": "fastmem.data.sources",
    "TokenSource": "fastmem.data.sources",
    "UnitStats": "fastmem.stats",
    "UsageError": "fastmem.errors",
    "ZipSource": "fastmem.data.sources",
    "assemble": "fastmem.models.checkpoints",
    "attribution": "fastmem.mitigation.attribution",
    "embedded_source": "fastmem.data.sources",
    "evaluate": "fastmem.stages.evaluate",
    "extract": "fastmem.stages.extract",
    "gap": "fastmem.ranking.gap",
    "index": "fastmem.stages.index",
    "load_model": "fastmem.models.checkpoints",
    "membership": "fastmem.scoring.membership",
    "merge": "fastmem.stages.merge",
    "mitigate": "fastmem.stages.mitigate",
    "model_names": "fastmem.models.registry",
    "open_run": "fastmem.stages.opened_run",
    "open_source": "fastmem.data.sources",
    "owners": "fastmem.ranking.ownership",
    "reliability": "fastmem.ranking.reliability",
    "report": "fastmem.stages.report",
    "responses": "fastmem.scoring.score",
    "scale_units": "fastmem.mitigation.scaling",
    "score": "fastmem.stages.score",
    "select": "fastmem.ranking.selection",
    "status": "fastmem.stages.status",
    "sweep": "fastmem.stages.sweep",
}

__all__ = [
    "ArraySource",
    "Edit",
    "EditPlan",
    "FastmemError",
    "FolderSource",
    "InputFileError",
    "OpenedRun",
    "ParquetSource",
    "Reporter",
    "SSCDOptions",
    "ScoreResult",
    "Selection",
    "TarSource",
    "TokenSource",
    "UnitStats",
    "UsageError",
    "ZipSource",
    "assemble",
    "attribution",
    "embedded_source",
    "evaluate",
    "extract",
    "gap",
    "index",
    "load_model",
    "membership",
    "merge",
    "mitigate",
    "model_names",
    "open_run",
    "open_source",
    "owners",
    "reliability",
    "report",
    "responses",
    "scale_units",
    "score",
    "select",
    "status",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmem' has no attribute {name!r}")
    # a stage that shares its name with a room is that room, which can be called
    value = import_module(f"fastmem.{name}") if name in _CALLABLE_ROOMS else getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


# the stages ``fastmem.index``, ``fastmem.report`` and ``fastmem.sweep`` share their names with the rooms in which their
# work is done, and Python binds a room's name in the package as soon as anything in it is imported
_CALLABLE_ROOMS = ("index", "report", "sweep")


class _CallableRoom(ModuleType):
    """A room that runs the stage of its name when it is called."""

    @property
    def __wrapped__(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(_HOMES[name]), name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self.__wrapped__(*arguments, **settings)


class _Package(ModuleType):
    """This package; it makes rooms callable when they are bound in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE_ROOMS and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
