"""The table of a sweep: every row is measured once and saved to a file, so that an interrupted sweep can be resumed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Protocol, TypedDict

import msgspec
import numpy as np
import torch

from fastmem.errors import UsageError
from fastmem.files import check_finite, check_tensors, read_tensors, write_tensors
from fastmem.reporter import SILENT, Reporter, duration
from fastmem.runs.interruption import Interruption
from fastmem.sweep.plan import NO_EDIT, Row

SCHEMA = "fastmem.sweep-row/2"


class RowUnavailable(UsageError):
    """Raised for a row whose units cannot be chosen; the sweep records the reason and continues with the next row."""


class Bench(Protocol):
    """An object that makes the edit of a row, attacks the edited model and measures its quality."""

    def edited(self, row: Row) -> AbstractContextManager[int]:
        """Return a context in which the model has the row's edit, and whose value is the number of scaled units.

        Raises: RowUnavailable where the row's units cannot be chosen.
        """

    def attack(self) -> np.ndarray:
        """Return the similarity of every target and its greedy completion from each prefix length, float32 [P,N]."""

    def quality(self, seed: int) -> dict[str, float]:
        """Return the metrics of the model with its present edits, by name, on samples drawn with ``seed``."""


class HeaderShape(TypedDict):
    """The header of a row's file."""

    metrics: dict[str, float | None] | None
    units: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    missing: str


@dataclass(frozen=True, eq=False)
class Measured:
    """A row with its results.

    Attributes:
        row: the edit and its seed.
        similarity: similarity of every target and its completion from each prefix length, float32 [P,N]; empty where
            the units could not be chosen.
        metrics: values by name; None where quality was not measured.
        units: number of scaled units.
        seconds: duration of the measurement.
        missing: why the units could not be chosen; empty where they could.
    """

    row: Row
    similarity: np.ndarray
    metrics: dict[str, float] | None
    units: int
    seconds: float
    missing: str = ""

    @property
    def values(self) -> dict[str, float]:
        """Metrics by name; empty where quality was not measured."""
        return self.metrics or {}

    def save(self, path: Path, sweep: str = "") -> None:
        """Write the row to a safetensors file; ``sweep`` is the id of what all rows of a sweep have in common.

        Raises: UsageError where the folder cannot be written.
        """
        header = {name: value for name, value in vars(self).items() if name != "similarity"}
        header |= {"row": asdict(self.row), "sweep": sweep}
        write_tensors(path, {"similarity": torch.from_numpy(self.similarity)}, SCHEMA, header)

    @classmethod
    def load(cls, path: Path, row: Row, sweep: str = "") -> Measured:
        """Read a row from a file that `save` wrote.

        Raises: InputFileError where it is missing or damaged, or holds another row or one of another sweep.
        """
        owner = {"sweep": sweep, "row": asdict(row)}
        tensors, header = read_tensors(path, SCHEMA, HeaderShape, owner)
        check_tensors(path, tensors, {"similarity": ("float32", ("P", "N"))})
        check_finite(path, tensors)
        known = {name: header[name] for name in ("units", "seconds", "missing")}
        # what is undefined is null in a file
        metrics = header["metrics"] and {k: float("nan") if v is None else v for k, v in header["metrics"].items()}
        return cls(row, tensors["similarity"].numpy(), metrics, **known)


@dataclass(frozen=True, eq=False)
class TargetSet:
    """The targets of a sweep, and when they count as extracted.

    Attributes:
        classes: class of each target, int64 [N].
        reported: bool [N], the targets that results are reported on, because no units were chosen on them.
        prefixes: prefix lengths, in tokens; edits are compared by the last one.
        threshold: a target counts as extracted when its similarity is above this.
        groups: targets that are also counted by themselves, bool [N], by name.
    """

    classes: np.ndarray
    reported: np.ndarray
    prefixes: tuple[int, ...]
    threshold: float
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)

    def extracted(self, measured: Measured) -> np.ndarray:
        """Return which targets are extracted under the edit of a row, from each prefix length, bool [P,N]."""
        return measured.similarity > self.threshold


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one sweep, each in a file of ``folder``; ``bench`` measures the rows that are missing.

    ``sweep`` is the id of what all rows have in common, which their files carry.
    """

    folder: Path
    bench: Bench
    sweep: str = ""

    def file(self, row: Row) -> Path:
        """Return the path of a row's file."""
        return self.folder / f"{row.key}.safetensors"

    def done(self, row: Row) -> bool:
        """Return whether the row is measured already."""
        return self.file(row).exists()

    def measure(self, row: Row, with_quality: bool = True) -> Measured:
        """Return the row with its results, read from its file or measured now.

        ``with_quality`` says whether quality is measured; it is added where an earlier call left it out.

        Raises: InputFileError where the file is damaged; UsageError where the folder cannot be written.
        """
        before = Measured.load(self.file(row), row, self.sweep) if self.done(row) else None
        if before is not None and (before.missing or before.metrics is not None or not with_quality):
            return before
        found = self._measure(row, before, with_quality)
        found.save(self.file(row), self.sweep)
        return found

    def _measure(self, row: Row, before: Measured | None, with_quality: bool) -> Measured:
        started = time.monotonic()
        try:
            with self.bench.edited(row) as units:
                # the attack has no randomness, so where the seed does not change the units, one attack holds for all
                known = before or self._first(row)
                similarity = self.bench.attack() if known is None else known.similarity
                metrics = self.bench.quality(row.seed) if with_quality else None
        except RowUnavailable as error:
            return Measured(row, np.empty((0, 0), np.float32), None, 0, 0.0, str(error))
        seconds = time.monotonic() - started + (before.seconds if before is not None else 0.0)
        return Measured(row, similarity, metrics, units, round(seconds, 3))

    def _first(self, row: Row) -> Measured | None:
        """Return the same edit with the first seed, where it scales the same units and is measured already."""
        first = replace(row, seed=0)
        return (
            Measured.load(self.file(first), first, self.sweep)
            if not row.drawn and row.seed and self.done(first)
            else None
        )


@dataclass(frozen=True)
class SweepPlan:
    """The expected size and duration of a sweep.

    Attributes:
        rows: number of rows.
        done: number of rows that are measured already.
        seconds: duration for the missing rows, at the speed of the first row.
        each: words that say how much work a row is.
        things: plural noun for what is counted.
    """

    rows: int
    done: int
    seconds: float
    each: str = ""
    things: str = "rows"

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.rows

    def __str__(self) -> str:
        done = f" ({self.done:,} are done)" if self.done > 1 else ""
        return f"{self.rows:,} rows{done}{self.each}, about {duration(self.seconds)} at the speed of the first"


def measure_rows(table: Table, rows: Sequence[Row], reporter: Reporter = SILENT, each: str = "") -> list[Measured]:
    """Return all rows with their results, read from their files or measured now.

    Args:
        table: measures rows, and saves them.
        rows: the rows, in the order in which they are measured.
        reporter: is given the plan after the first row, and then the number of rows done.
        each: words for the plan that say how much work a row is.

    Raises: KeyboardInterrupt on Ctrl-C, after the current row was saved.
    """
    # the first row, the unedited model, shows how long a row takes
    first = table.measure(NO_EDIT)
    done = sum(table.done(row) for row in rows)
    reporter.planned(SweepPlan(len(rows), done, first.seconds * (len(rows) - done), each))
    measured = []
    with Interruption() as interruption:
        for row in rows:
            measured.append(table.measure(row))
            reporter.advance(1)
            if interruption.requested:
                raise interruption.stopped
    return measured


def mean_of(measured: Sequence[Measured], metric: str) -> float:
    """Return the mean of a metric over rows, all of which must have it."""
    return sum(m.values[metric] for m in measured) / len(measured)


def unedited_cost(measured: Sequence[Measured], metric: str) -> float:
    """Return the mean of a metric over the rows of the unedited model, among all rows."""
    return mean_of([m for m in measured if m.row.by == NO_EDIT.by], metric)
