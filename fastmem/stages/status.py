"""The status of a run: how far the work in its folder is, while it runs or after, read by any process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastmem.errors import InputFileError
from fastmem.runs.owner import Owner, living_owner
from fastmem.runs.progress import Line, last_line
from fastmem.stages.result import StageResult

RUNNING, FINISHED, INTERRUPTED, NOT_RUNNING = "running", "finished", "interrupted", "not running"
# the file with which a stage begins, and the one with which it ends
STAGES = {
    "score": ("run.json", "result.json"),
    "sweep": ("run.json", "sweep.json"),
    "extract": ("settings.json", "result.json"),
    "evaluate": ("samples.json", None),
    "index": ("pending", "index.json"),
}
# where the folders of later stages lie in a run
BELOW = ("extractions/*", "samples/*", "sweep")


@dataclass(frozen=True, eq=False)
class RunStatus(StageResult):
    """How far the work in a folder is; ``document`` has all of it, and ``path`` is the folder."""

    @property
    def state(self) -> str:
        """One of "running", "finished", "interrupted" and "not running"."""
        return str(self.document["state"])


def status(run: str | os.PathLike[str]) -> RunStatus:
    """Say how far the work in a folder is: of a run or of one of its later stages, or of an index.

    Args:
        run: the folder.

    Raises: InputFileError where there is no such folder, or nothing of a run in it.
    """
    path = Path(run)
    if not os.path.isdir(path):
        raise InputFileError(f"expected the folder of a run at {path}, got none: check --run")
    document = _describe(path)
    stages = [_describe(folder) for folder in _folders_below(path)]
    if document is None and not any(stages):
        raise InputFileError(
            f"expected the folder of a run, of one of its stages or of an index at {path}, got one with nothing of "
            "either: check --run"
        )
    nothing = {"run": str(path), "stage": None, "state": NOT_RUNNING}
    return RunStatus(path, (document or nothing) | {"stages": [found for found in stages if found is not None]})


def _folders_below(path: Path) -> Iterator[Path]:
    for pattern in BELOW:
        yield from sorted(folder for folder in path.glob(pattern) if folder.is_dir())


def _describe(folder: Path) -> dict[str, Any] | None:
    """Return the status of the work in one folder; None where there was none."""
    owner, line = living_owner(folder), last_line(folder)
    begun = next((stage for stage in STAGES if _has_begun(folder, stage)), None)
    if owner is None and line is None and begun is None:
        return None
    if owner is not None and line is not None and not _is_of(line, owner):
        # the owner has not got to its first plan; the log is of work before
        line = None
    stage = line.stage if line is not None else owner.work if owner is not None else begun
    # a process says that it has finished before it gives its folder back
    state = RUNNING if owner is not None and (line is None or line.event == "working") else _after(folder, stage, line)
    document: dict[str, Any] = {"run": str(folder), "stage": stage, "state": state}
    document["advice"] = "go on with --resume" if state == INTERRUPTED else None
    keys = ("things", "total", "done", "skipped", "per_second", "seconds_left", "ranks", "ranks_alive", "since")
    document |= {key: None if line is None else getattr(line, key) for key in keys}
    document["left"] = None if line is None else max(0, line.total - line.done)
    if owner is not None:
        document["since"] = owner.since
    if state != RUNNING:
        document |= {"seconds_left": None, "ranks_alive": 0}
    document["updated"] = None if line is None else line.time
    document["reason"] = (line.reason or None) if line is not None and state == INTERRUPTED else None
    document["owner"] = None if owner is None else {"host": owner.host, "process": owner.process}
    return document


def _is_of(line: Line, owner: Owner) -> bool:
    return (line.host, line.process, line.since) == (owner.host, owner.process, owner.since)


def _has_begun(folder: Path, stage: str) -> bool:
    begins, ends = STAGES[stage]
    # a run and a sweep begin with a file of the same name
    if begins == "run.json" and (folder / "rows").is_dir() != (stage == "sweep"):
        return False
    return any((folder / name).exists() for name in (begins, ends) if name is not None and name != "result.json")


def _after(folder: Path, stage: str | None, line: Line | None) -> str:
    """Return the state of work that nobody does any more."""
    if line is not None and line.event == "finished":
        return FINISHED
    ends = STAGES[stage][1] if stage in STAGES else None
    if ends is None and line is None:
        # no file says that samples are complete, and there is no log
        return NOT_RUNNING
    if ends is None or not (folder / ends).exists():
        return INTERRUPTED
    if line is None:
        # an index that is extended has vectors that wait
        return INTERRUPTED if stage == "index" and any((folder / "pending").glob("*")) else FINISHED
    # later lines may be missing, after a full disk
    with suppress(OSError, ValueError):
        if (folder / ends).stat().st_mtime >= datetime.fromisoformat(line.time).timestamp():
            return FINISHED
    return INTERRUPTED
