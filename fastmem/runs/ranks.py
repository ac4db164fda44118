"""The processes of one job: ranks that torchrun or a cluster starts, which share work through a store of torch.

Rank 0 leads: it writes what the others only help to compute. A rank takes a work unit from a counter in the store, so
fast ranks do more, and the units of one that has vanished are taken over. Nothing is exchanged but a few bytes for a
unit, so neither NCCL nor gloo is used, and a rank may be lost at any moment. Results travel as files in the run folder.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fastmem.errors import FastmemError, UsageError
from fastmem.runs.interruption import INTERRUPTED
from fastmem.runs.owner import Owner, owned

# a rank shows that it lives this often, and is taken for dead after that long
BEAT_SECONDS, DEAD_SECONDS = 2.0, 60.0
# how long the ranks of a job may take to start, and the last ones to end
START_SECONDS, END_SECONDS = 600.0, 60.0
WAIT_SECONDS, ANSWER_SECONDS = 0.05, 0.5
# units that may be finished before their turn, for every rank
AHEAD = 4

T = TypeVar("T")


class RankLost(FastmemError):
    """The leading rank, and with it the store, is gone."""

    exit_code = 1


class LeaderFailed(FastmemError):
    """The leading rank has ended a stage with an error, which it tells itself."""

    def __init__(self, code: int) -> None:
        super().__init__(f"expected the leading rank to finish, got its exit code {code}: see what it says")
        self.exit_code = code


class Ranks:
    """The ranks of a job, seen from one of them.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._seen: dict[int, tuple[int, float]] = {}
        self._owners: dict[int, Owner] = {}
        self.stage, self._stages = "", 0
        self.tell(f"who/{rank}", msgspec.json.encode(Owner.this_process("rank")).decode())
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this rank writes the results."""
        return self.rank == 0

    def begin(self) -> None:
        """Begin a stage, whose keys have names of their own; all ranks go through the same stages in the same order."""
        self._stages += 1
        self.stage = f"stage{self._stages}"

    def key(self, name: str) -> str:
        """Return a key of this stage."""
        return f"{self.stage}/{name}"

    def end(self, code: int) -> None:
        """Say how the leading rank's part of a stage ended, as an exit code."""
        self.tell(self.key("end"), str(code))

    def tell(self, key: str, value: str = "1") -> None:
        """Set a key for all ranks."""
        self._asked(lambda: self.store.set(key, value))

    def heard(self, key: str) -> str | None:
        """Return the value of a key; None where no rank has set it."""
        return self._asked(lambda: self.store.get(key).decode() if self.store.check([key]) else None)

    def count(self, key: str, more: int = 0) -> int:
        """Add to a counter, which starts at 0, and return its value."""
        return self._asked(lambda: int(self.store.add(key, more)))

    def claim(self, key: str, before: str | None) -> bool:
        """Write this rank's number to a key whose value was ``before``; return whether no other rank was faster."""
        me = str(self.rank)
        now: str = self._asked(lambda: self.store.compare_set(key, before or "", me).decode())
        return now == me

    def forget(self, key: str) -> None:
        """Remove a key that no rank will ask for again."""
        self._asked(lambda: self.store.delete_key(key))

    def wait_for(self, key: str) -> str:
        """Return a key's value as soon as the leading rank has set it.

        Raises: RankLost where that rank is gone, LeaderFailed where it has ended the stage with an error.
        """
        while (value := self.heard(key)) is None:
            self.check_leader()
            time.sleep(WAIT_SECONDS)
        return value

    def check_leader(self) -> None:
        """Raises: RankLost where the leading rank is gone, LeaderFailed where it has ended the stage with an error."""
        if self.leads:
            return
        code = self.heard(self.key("end"))
        if code is not None and code != "0":
            raise LeaderFailed(int(code))
        if code is None and self.is_dead(0):
            raise self._lost()

    def is_dead(self, rank: int) -> bool:
        """Return whether a rank has vanished; one that has not started yet has not."""
        if rank == self.rank:
            return False
        if rank not in self._owners:
            text = self.heard(f"who/{rank}")
            if text is None:
                return False
            self._owners[rank] = msgspec.json.decode(text, type=Owner)
        owner = self._owners[rank]
        if owner.is_here:
            return not owner.runs_here()
        beats, now = self.count(f"beat/{rank}"), time.monotonic()
        known, since = self._seen.setdefault(rank, (beats, now))
        if beats != known:
            self._seen[rank] = (beats, now)
            return False
        return now - since > DEAD_SECONDS

    def alive(self) -> int:
        """Return how many ranks have not vanished."""
        return sum(not self.is_dead(rank) for rank in range(self.size))

    def leave(self) -> None:
        """Say that this rank ends; the leading one waits for the others, because the store ends with it.

        It also waits for those that have not started yet: they are to learn how it ended.
        """
        if not self.leads:
            with suppress(FastmemError):
                self.tell(f"left/{self.rank}")
            self._stopped.set()
            return
        last = time.monotonic() + END_SECONDS
        with suppress(FastmemError):
            while time.monotonic() < last and any(
                self.heard(f"left/{rank}") is None and not self.is_dead(rank) for rank in range(1, self.size)
            ):
                time.sleep(WAIT_SECONDS)
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with suppress(FastmemError):
                self.count(f"beat/{self.rank}", 1)

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        # torch raises errors of several kinds where the store's host is gone
        except (RuntimeError, ValueError) as error:
            raise self._lost() from error

    def _lost(self) -> RankLost:
        return RankLost(
            "expected the leading rank until the end, got none any more: run the same command again with --resume"
        )


class WorkQueue:
    """Work units with numbers from 0, which the ranks take one after the other.

    Args:
        ranks: the ranks.
        name: of the queue, the same in all ranks and used once.
        count: number of units.
        bounded: whether units may be finished only a little before their turn, so that few results wait.
    """

    def __init__(self, ranks: Ranks, name: str, count: int, *, bounded: bool) -> None:
        self.ranks, self.name, self.count = ranks, ranks.key(name), count
        self.window = AHEAD * ranks.size if bounded else count
        self.first = self.settled = 0
        self._looked = 0.0

    def open(self, first: int = 0) -> None:
        """Let the ranks take units from number ``first`` on; for the leading rank."""
        self.first = self.settled = first
        self.ranks.tell(f"{self.name}/first", str(first))

    def join(self) -> None:
        """Wait until the queue is open; for the other ranks.

        Raises: RankLost where the leading rank is gone, LeaderFailed where it has ended the stage with an error.
        """
        self.first = self.settled = int(self.ranks.wait_for(f"{self.name}/first"))

    def take(self, holds: bool) -> int | None:
        """Return the number of a unit that this rank is to do now, or None where there is none at this moment.

        ``holds`` says whether this rank has units that it has not finished; only one that has none takes over those of
        ranks that have vanished.
        """
        ranks, name = self.ranks, self.name
        self._update()
        given = self.first + ranks.count(f"{name}/next")
        if given < min(self.count, self.settled + self.window):
            number = self.first + ranks.count(f"{name}/next", 1) - 1
            if number < self.count:
                ranks.tell(f"{name}/owner/{number}", str(ranks.rank))
                return number
        if holds or time.monotonic() - self._looked < 1:
            return None
        self._looked = time.monotonic()
        for number in range(self.settled, min(given, self.count)):
            if self.is_done(number):
                continue
            owner = ranks.heard(f"{name}/owner/{number}")
            # a rank that vanished between its two steps left a unit without an owner
            if owner is not None and ranks.is_dead(int(owner)) and ranks.claim(f"{name}/owner/{number}", owner):
                return number
            lost = owner is None and any(map(ranks.is_dead, range(ranks.size)))
            if lost and ranks.claim(f"{name}/owner/{number}", None):
                return number
        return None

    def finish(self, number: int) -> None:
        """Say that a unit's result can be read."""
        self.ranks.tell(f"{self.name}/done/{number}")

    def is_done(self, number: int) -> bool:
        """Return whether a unit's result can be read."""
        return number < self.settled or self.ranks.heard(f"{self.name}/done/{number}") is not None

    def settle(self) -> None:
        """Say that the next unit in order has been used; for the leading rank."""
        self.ranks.count(f"{self.name}/settled", 1)
        with suppress(FastmemError):
            self.ranks.forget(f"{self.name}/done/{self.settled}")
            self.ranks.forget(f"{self.name}/owner/{self.settled}")
        self.settled += 1

    @property
    def is_over(self) -> bool:
        """Whether all units have been used."""
        self._update()
        return self.settled >= self.count

    def _update(self) -> None:
        if not self.ranks.leads:
            self.settled = self.first + self.ranks.count(f"{self.name}/settled")

    def numbers(
        self, holds: Callable[[], bool], stop: Callable[[], bool], settled: Callable[[int], None] = lambda number: None
    ) -> Iterator[int | None]:
        """Yield the numbers of units that this rank is to do, until those of all ranks are done.

        The caller says `finish` of each when its result lies in a file.

        Args:
            holds: tells whether this rank has units that it has not finished; while it has, None may be yielded, which
                says that there is none to take before they are.
            stop: tells whether this process is to end early.
            settled: is called, in the leading rank, with each number in order as soon as the units up to it are done.

        Raises: RankLost where the leading rank is gone, LeaderFailed where it has ended the stage with an error.
        """
        while not stop():
            while self.ranks.leads and self.settled < self.count and self.is_done(self.settled):
                settled(self.settled)
                self.settle()
            if self.is_over:
                return
            number = self.take(holds())
            if number is not None or holds():
                yield number
            else:
                self.wait()

    def wait(self) -> None:
        """Pause, because there is nothing to do.

        Raises: RankLost where the leading rank is gone, LeaderFailed where it has ended the stage with an error.
        """
        self.ranks.check_leader()
        time.sleep(WAIT_SECONDS)


_JOINED: list[Ranks] = []


def current_ranks() -> Ranks | None:
    """Return the ranks of the job that this process belongs to; None for a process that works alone.

    The variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say so, which torchrun sets.

    Raises: UsageError where they are set and wrong, or the other ranks cannot be reached.
    """
    if not in_job():
        return None
    if not _JOINED:
        _JOINED.append(_join())
        atexit.register(_JOINED[0].leave)
    return _JOINED[0]


def helps_only() -> bool:
    """Return whether this process is a rank other than the leading one, which says and writes nothing itself."""
    return in_job() and os.environ["RANK"] != "0"


def in_job() -> bool:
    """Return whether this process is one of several ranks."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "").strip() not in ("", "1")


def _join() -> Ranks:
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size_found = next(iter(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS))))
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            "expected ranks that reach each other through RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, got "
            f"{' '.join(str(error).split())[:160]}: start them with torchrun"
        ) from error
    attempt = _begin_attempt(store, size_found) if rank == 0 else _find_attempt(store, rank)
    return Ranks(PrefixStore(f"fastmem/{attempt}", store), rank, size_found)


def _begin_attempt(store: Any, size: int) -> str:
    """Return the number of this attempt at the job, and tell it every other rank that asks, in the leading rank."""
    # after a restart torchrun's store may still hold the keys of the attempt before
    attempt = str(store.add("fastmem/attempts", 1))

    def answer() -> None:
        asks = [f"fastmem/asks/{rank}" for rank in range(1, size)]
        with suppress(RuntimeError, ValueError):
            while True:
                for key in asks:
                    if store.check([key]):
                        store.set(f"fastmem/answers/{store.get(key).decode()}", attempt)
                time.sleep(ANSWER_SECONDS)

    threading.Thread(target=answer, daemon=True).start()
    return attempt


def _find_attempt(store: Any, rank: int) -> str:
    """Return the number of this attempt at the job, which the leading rank knows.

    Raises: UsageError where that rank does not start.
    """
    # no earlier attempt can have answered this question
    question, last = os.urandom(8).hex(), time.monotonic() + START_SECONDS
    with suppress(RuntimeError, ValueError):
        store.set(f"fastmem/asks/{rank}", question)
        while time.monotonic() < last:
            if store.check([f"fastmem/answers/{question}"]):
                found: str = store.get(f"fastmem/answers/{question}").decode()
                return found
            time.sleep(WAIT_SECONDS)
    raise UsageError(f"expected rank 0 to start within {START_SECONDS:.0f} s, got no answer: start all ranks together")


def was_restarted() -> bool:
    """Return whether torchrun has started this job's processes again, after one of them was lost."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def local_ranks() -> int:
    """Return how many processes of the job share this machine."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def local_rank() -> int:
    """Return the number of this process among those on its machine, from 0; each takes the GPU of its number."""
    text = os.environ.get("LOCAL_RANK", "0")
    return int(text) if text.isdecimal() else 0


@contextmanager
def shared(folder: Path, work: str) -> Iterator[Ranks | None]:
    """A stage that all ranks of the job go through; entering gives the ranks, or None for a process that works alone.

    The process that writes takes the folder, as `owned` does. The others leave when it has finished.

    Args:
        folder: where the results go; made where it is missing.
        work: what is done there, in a word or two, for the message that others get.

    Raises: UsageError where another process works there, or the folder cannot be written; LeaderFailed and RankLost, in
    the helping ranks, where the leading one has failed or is gone.
    """
    ranks = current_ranks()
    if ranks is None:
        with owned(folder, work):
            yield None
        return
    ranks.begin()
    if not ranks.leads:
        yield ranks
        ranks.wait_for(ranks.key("end"))
        return

    def alive() -> tuple[int, int]:
        with suppress(FastmemError):
            return ranks.size, ranks.alive()
        return ranks.size, 1

    try:
        with owned(folder, work, alive):
            yield ranks
    except BaseException as error:
        with suppress(FastmemError):
            ranks.end(getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1))
        raise
    ranks.end(0)
