"""The table of a sweep: a row is measured once and kept whole in a file, so that a restart never repeats it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fastmem.errors import UsageError
from fastmem.files import read_tensors, write_tensors
from fastmem.reporter import SILENT, Reporter, duration
from fastmem.runs.interruption import Interruption
from fastmem.sweep.plan import NO_EDIT, Row

SCHEMA = "fastmem.sweep-row/2"


class RowUnavailable(UsageError):
    """A row whose units cannot be chosen, such as matched ones of more than half a layer; the sweep goes on."""


class Bench(Protocol):
    """What rows are measured with: a model whose targets, prefixes and reference were prepared once."""

    def edited(self, row: Row) -> AbstractContextManager[int]:
        """The model with the row's edit while entered; gives the number of units that were scaled.

        Raises: RowUnavailable where the row's units cannot be chosen.
        """

    def attack(self) -> np.ndarray:
        """Similarity of every target to what greedy generation makes of its prefixes, float32 [P,N]."""

    def quality(self, seed: int) -> dict[str, float]:
        """Quality by metric of the model as it is, its samples drawn with ``seed``."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A finished row.

    similarity: float32 [P,N], empty where the row is not available; metrics: None where quality was not asked for;
    units: how many were scaled; seconds: of the measurement; missing: why the row is not available, else empty.
    """

    row: Row
    similarity: np.ndarray
    metrics: dict[str, float] | None
    units: int
    seconds: float
    missing: str = ""

    def save(self, path: Path) -> None:
        """Write the row. Raises: UsageError where the place cannot be written."""
        header = {name: value for name, value in vars(self).items() if name != "similarity"}
        header["row"] = asdict(self.row)
        write_tensors(path, {"similarity": torch.from_numpy(self.similarity)}, SCHEMA, header)

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what ``save`` wrote. Raises: InputFileError for a missing, damaged or foreign file."""
        tensors, header = read_tensors(path, SCHEMA)
        known = {name: header[name] for name in ("metrics", "units", "seconds", "missing")}
        return cls(Row(**header["row"]), tensors["similarity"].numpy(), **known)


@dataclass(frozen=True, eq=False)
class TargetSet:
    """The targets of a table.

    classes: int64 [N]; reported: bool [N], those that no units were chosen by; prefixes: in tokens, the last is the one
    that is compared; threshold: similarity above which a target counts as extracted; groups: masks bool [N] by name
    that are counted beside the whole.
    """

    classes: np.ndarray
    reported: np.ndarray
    prefixes: tuple[int, ...]
    threshold: float
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)

    def extracted(self, measured: Measured) -> np.ndarray:
        """Which targets a row's model gives away, bool [P,N]."""
        return measured.similarity > self.threshold


@dataclass(frozen=True, eq=False)
class Table:
    """The measured rows of one experiment, a file each in ``folder``."""

    folder: Path
    bench: Bench

    def file(self, row: Row) -> Path:
        return self.folder / f"{row.key}.safetensors"

    def done(self, row: Row) -> bool:
        """Whether the row is measured."""
        return self.file(row).exists()

    def measure(self, row: Row, with_quality: bool = True) -> Measured:
        """The row, from its file where it is finished; quality is added where an earlier call left it out.

        Raises: InputFileError for a damaged file; UsageError where the folder cannot be written.
        """
        before = Measured.load(self.file(row)) if self.done(row) else None
        if before is not None and (before.missing or before.metrics is not None or not with_quality):
            return before
        found = self._measure(row, before, with_quality)
        found.save(self.file(row))
        return found

    def _measure(self, row: Row, before: Measured | None, with_quality: bool) -> Measured:
        started = time.monotonic()
        try:
            with self.bench.edited(row) as units:
                # the attack is greedy: where a seed is of the samples alone, the first row's holds for all
                known = before or self._first(row)
                similarity = self.bench.attack() if known is None else known.similarity
                metrics = self.bench.quality(row.seed) if with_quality else None
        except RowUnavailable as error:
            return Measured(row, np.empty((0, 0), np.float32), None, 0, 0.0, str(error))
        seconds = time.monotonic() - started + (before.seconds if before is not None else 0.0)
        return Measured(row, similarity, metrics, units, round(seconds, 3))

    def _first(self, row: Row) -> Measured | None:
        """The same edit with the first seed of the samples, where it is measured."""
        first = replace(row, seed=0)
        return Measured.load(self.file(first)) if not row.drawn and row.seed and self.done(first) else None


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will take.

    Attributes:
        rows: of the plan.
        done: those that are measured already.
        seconds: for the others, at the speed of the first row.
        each: what a row takes, in words.
    """

    rows: int
    done: int
    seconds: float
    each: str = ""
    things: str = "rows"

    @property
    def total(self) -> int:
        """Rows of the plan."""
        return self.rows

    def __str__(self) -> str:
        done = f" ({self.done:,} are done)" if self.done > 1 else ""
        return f"{self.rows:,} rows{done}{self.each}, about {duration(self.seconds)} at the speed of the first"


def measure_rows(table: Table, rows: Sequence[Row], reporter: Reporter = SILENT, each: str = "") -> list[Measured]:
    """Every row, the finished ones from their files.

    Args:
        table: where rows are kept, and what they are measured with.
        rows: in the order in which they are measured.
        reporter: is told the plan after the first row, and then of rows that are done.
        each: what a row takes, for the plan's sentence.

    Raises: KeyboardInterrupt after the row in hand where Ctrl-C was pressed.
    """
    # the unedited model tells how long a row takes
    first = table.measure(NO_EDIT)
    done = sum(table.done(row) for row in rows)
    reporter.planned(SweepPlan(len(rows), done, first.seconds * (len(rows) - done), each))
    measured = []
    with Interruption() as interruption:
        for row in rows:
            measured.append(table.measure(row))
            reporter.advance(1)
            if interruption.requested:
                raise KeyboardInterrupt
    return measured


def mean_of(measured: Sequence[Measured], metric: str) -> float:
    """A metric's mean over rows that have it."""
    return sum(m.metrics[metric] for m in measured) / len(measured)


def unedited_cost(measured: Sequence[Measured], metric: str) -> float:
    """A metric of the unedited model, the mean over its samples' seeds."""
    return mean_of([m for m in measured if m.row.by == NO_EDIT.by], metric)
