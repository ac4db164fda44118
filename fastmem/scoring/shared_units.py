"""Work units of a scoring pass that several ranks share: each computes some, and the leading one adds all in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastmem.data.manifest import WorkUnit
from fastmem.errors import InputFileError
from fastmem.files import read_tensors, write_tensors
from fastmem.runs.ranks import WorkQueue
from fastmem.scoring.running_set import RunningSet, UnitShape

SCHEMA = "fastmem.score-unit/1"
# a shared file system may show a file this much later than it was written
VISIBLE_SECONDS = 60.0

Result = tuple[dict[str, Tensor], Mapping[str, Any]]


@dataclass
class SharedUnits:
    """What one rank does of the work units of a set.

    Attributes:
        queue: gives the numbers of units.
        units: all work units of the set.
        folder: where results wait until it is their turn.
        running: the results so far; those of the leading rank are the set's.
        owner: entries that say which run and set the files are of.
        batch: images of a batch.
        stop: tells whether this process is to end early.
        added: is called, in the leading rank, after a unit was added, with its number of images.
    """

    queue: WorkQueue
    units: list[WorkUnit]
    folder: Path
    running: RunningSet
    owner: Mapping[str, Any]
    batch: int
    stop: Callable[[], bool]
    added: Callable[[int], None]
    # numbers of units that were taken and are not finished
    held: set[int] = field(default_factory=set)
    # for every batch that was asked for, the number of its unit and whether it is the unit's last
    asked: deque[tuple[int, bool]] = field(default_factory=deque)
    # the leading rank's own results, and those units whose files could not be read
    ready: dict[int, Result] = field(default_factory=dict)
    again: list[int] = field(default_factory=list)
    missed: dict[int, float] = field(default_factory=dict)

    def batches(self) -> Iterator[np.ndarray | None]:
        """Yield the manifest positions of the next batch, int64 [n], or None where there is none before others end.

        Raises: RankLost and LeaderFailed, as `WorkQueue.wait`.
        """
        while not self.stop():
            if self.queue.ranks.leads:
                self._add_finished()
            if self.queue.is_over:
                return
            number = self.again.pop() if self.again else self.queue.take(bool(self.held))
            if number is None:
                if self.held:
                    yield None
                else:
                    self.queue.wait()
            elif self._file(number).exists():
                # it was finished before the job was started again
                self.queue.finish(number)
            else:
                self.held.add(number)
                unit = self.units[number]
                for start in range(unit.start, unit.stop, self.batch):
                    stop = min(start + self.batch, unit.stop)
                    self.asked.append((number, stop == unit.stop))
                    yield np.arange(start, stop)

    def end_batch(self) -> None:
        """Say that the results of the oldest batch that was asked for have been added to the open work unit."""
        number, ends = self.asked.popleft()
        if not ends:
            return
        tensors, header = self.running.take_unit(self.units[number])
        if self.queue.ranks.leads:
            self.ready[number] = tensors, header
        else:
            write_tensors(self._file(number), tensors, SCHEMA, {**header, **self.owner, "unit": number})
        self.queue.finish(number)
        self.held.discard(number)

    def _add_finished(self) -> None:
        """Add the results of all units whose turn it is."""
        while not self.queue.is_over and (found := self._result(self.queue.settled)) is not None:
            number = self.queue.settled
            unit = self.units[number]
            self.running.put_unit(unit, *found)
            self.queue.settle()
            self.ready.pop(number, None)
            self._file(number).unlink(missing_ok=True)
            self.added(unit.stop - unit.start)

    def _result(self, number: int) -> Result | None:
        if number in self.ready:
            return self.ready[number]
        if number in self.held or number in self.again or not self.queue.is_done(number):
            return None
        file = self._file(number)
        try:
            tensors, header = read_tensors(file, SCHEMA, UnitShape, {**self.owner, "unit": number})
            self.running.check_unit(self.units[number], tensors, header, file)
            return tensors, header
        except InputFileError:
            since = self.missed.setdefault(number, time.monotonic())
            if file.exists() or time.monotonic() - since > VISIBLE_SECONDS:
                # damaged, or never to be seen: it is computed again
                file.unlink(missing_ok=True)
                self.again.append(number)
            return None

    def _file(self, number: int) -> Path:
        return self.folder / f"unit-{number:07d}.safetensors"
