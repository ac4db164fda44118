"""How far the work in a folder is: a log of JSON lines there, which another terminal reads while the work runs.

The log is no result. The process that has the folder writes it at most every few seconds, and goes on where it cannot.
Every line says all there is to say, so the last one is enough.
"""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from fastmem.errors import FastmemError
from fastmem.files import PARTIAL
from fastmem.reporter import Plan, heard_by, printable

SCHEMA: Final = "fastmem.progress/1"
# whoever compares the bytes of results leaves this file out
LOG_NAME = "progress.jsonl"
# a line is added at most this often; a log that has grown to this size keeps its last part
LOG_SECONDS, LOG_BYTES, KEPT_BYTES = 5.0, 256 * 2**10, 64 * 2**10
# speed is that of this last time
SPEED_SECONDS = 300.0
LONGEST_REASON = 500

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Line(msgspec.Struct, frozen=True, omit_defaults=False):
    """One line of the log.

    Attributes:
        time: when it was written, local date and time with the distance from UTC.
        event: "working"; "finished" for work that came to its end; "stopped" for work that ended before it.
        stage: what is done.
        host: name of the machine of the process that writes.
        process: its number.
        since: when it took the folder.
        things: what is counted, in the plural.
        total: how many there are in this piece of work.
        done: how many of them are done, those of an interrupted pass included.
        skipped: how many images could not be read.
        per_second: how many were done in a second, lately; None where nothing was measured.
        seconds_left: how long the rest takes at that speed; None where it is not known.
        ranks: how many processes share the work.
        ranks_alive: how many of them have not vanished.
        reason: why it was stopped, empty where it was not.
        schema: name and version of this form.
    """

    time: str
    event: Literal["working", "finished", "stopped"]
    stage: str
    host: str
    process: Count
    since: str
    things: str
    total: Count
    done: Count
    skipped: Count
    per_second: Amount | None
    seconds_left: Amount | None
    ranks: Count
    ranks_alive: Count
    reason: str
    schema: Literal["fastmem.progress/1"]


class ProgressLog:
    """The log of one process's work in a folder; it begins with the first plan.

    Args:
        folder: where it lies.
        stage: what is done.
        host: name of this machine.
        process: number of this process.
        since: when it took the folder.
        ranks: gives how many processes share the work, and how many of them are alive.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        host: str,
        process: int,
        since: str,
        ranks: Callable[[], tuple[int, int]],
    ) -> None:
        self.file, self.stage, self.host, self.process, self.since = folder / LOG_NAME, stage, host, process, since
        self.ranks = ranks
        self.things = ""
        self.total = self.done = self.unread = 0
        self.written: float | None = None
        # when something was first done of this piece of work
        self.first = 0.0
        # when how much was done; what an interrupted pass has left arrives at once and says nothing of the speed
        self.seen: deque[tuple[float, int]] = deque()

    def planned(self, plan: Plan) -> None:
        """Begin a piece of work."""
        self.things, self.total, self.done, self.unread = plan.things, plan.total, 0, 0
        self.seen.clear()
        self._write("working")

    def advance(self, done: int) -> None:
        """Take in that more is done."""
        self.done += done
        now = time.monotonic()
        if not self.seen:
            self.first = now
        if len(self.seen) < 2 and now - self.first < 1:
            self.seen.clear()
            self.seen.append((now, self.done))
        if self.written is not None and now - self.written >= LOG_SECONDS:
            self.seen.append((now, self.done))
            while len(self.seen) > 2 and now - self.seen[0][0] > SPEED_SECONDS:
                self.seen.popleft()
            self._write("working")

    def skipped(self, count: int) -> None:
        """Take in that more images could not be read."""
        self.unread += count

    def end(self, reason: str | None) -> None:
        """Say how the work ended: None for its end, or why it was stopped."""
        if self.written is not None:
            self.seen.append((time.monotonic(), self.done))
            self._write("finished" if reason is None else "stopped", reason or "")

    def _write(self, event: Literal["working", "finished", "stopped"], reason: str = "") -> None:
        self.written = time.monotonic()
        speed = None
        if len(self.seen) > 1 and self.seen[-1][0] > self.seen[0][0]:
            speed = (self.seen[-1][1] - self.seen[0][1]) / (self.seen[-1][0] - self.seen[0][0]) or None
        left = max(0, self.total - self.done)
        size, alive = self.ranks()
        line = Line(
            time=_now(),
            event=event,
            stage=self.stage,
            host=self.host,
            process=self.process,
            since=self.since,
            things=self.things,
            total=max(0, self.total),
            done=max(0, self.done),
            skipped=self.unread,
            per_second=None if speed is None else round(speed, 3),
            seconds_left=None if speed is None else round(left / speed, 1),
            ranks=size,
            ranks_alive=alive,
            reason=printable(reason)[:LONGEST_REASON],
            schema=SCHEMA,
        )
        # a full disk, or a folder that has gone, does not end the work
        with suppress(OSError):
            _append(self.file, msgspec.json.encode(line))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _append(file: Path, line: bytes) -> None:
    # a link or a pipe that was put there is neither followed nor waited for
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(file, flags, 0o666), "r+b", buffering=0, closefd=True) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            return
        end = opened.seek(0, os.SEEK_END)
        if end >= LOG_BYTES:
            _shorten(file, line)
            return
        if end:
            opened.seek(end - 1)
            # a killed process may have left half a line
            line = line if opened.read(1) == b"\n" else b"\n" + line
        opened.write(line + b"\n")


def _shorten(file: Path, line: bytes) -> None:
    """Keep the last lines, whole, with one more."""
    kept = _tail(file, KEPT_BYTES).partition(b"\n")[2]
    partial = file.with_name(f".{LOG_NAME}.{os.urandom(8).hex()}{PARTIAL}")
    try:
        with open(partial, "xb") as opened:
            opened.write(kept + line + b"\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _tail(file: Path, size: int) -> bytes:
    """Return the last bytes of a regular file. Raises: OSError where there is none."""
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            return b""
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - size))
        return opened.read(size)


def last_line(folder: Path) -> Line | None:
    """Return what the log in a folder says last; None without a log, or where nothing of it can be read."""
    with suppress(OSError, ValueError):
        for line in reversed(_tail(folder / LOG_NAME, KEPT_BYTES).split(b"\n")):
            # half a line, or one of another version
            with suppress(msgspec.DecodeError, RecursionError):
                return msgspec.json.decode(line, type=Line)
    return None


@contextmanager
def logged(log: ProgressLog) -> Iterator[None]:
    """Write how far the work within is to a log, and how it ended; nothing is written where there was no plan."""
    with heard_by(log):
        try:
            yield
        except BaseException as error:
            log.end(str(error) if isinstance(error, FastmemError) else type(error).__name__)
            raise
        log.end(None)
