"""One process at a time works in a folder: taking it is one atomic step, and the file of its owner says who has it.

The file ``.owner-N`` holds the owner's host, process, start time and work. A dead owner's folder is taken
by making the file with the next number, which only one process can. The highest number is the owner's.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from fastmem.errors import FastmemError, UsageError
from fastmem.files import OWNER_PREFIX, read_bounded, remove_leftovers
from fastmem.runs.progress import LOG_NAME, ProgressLog, logged

OWNER = re.compile(re.escape(OWNER_PREFIX) + r"(\d{1,9})")
OWNER_BYTES = 4096
# states of a process that has ended and whose parent has not asked how, as the system writes them
ENDED = ("Z", "X")
# an owner on another machine shows that it lives by touching its file this often, and is dead after that long
BEAT_SECONDS, DEAD_SECONDS = 15.0, 180.0


@dataclass(frozen=True)
class Owner:
    """The process that works in a folder.

    Attributes:
        host: name of its machine.
        process: number of the process.
        started: when the process started, in clock ticks since the machine did; 0 where that is not known.
        since: when it took the folder, local date and time.
        work: what it does there.
    """

    host: str
    process: int
    started: int
    since: str
    work: str

    @classmethod
    def this_process(cls, work: str) -> Owner:
        """Return the owner that this process is."""
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()), now, work)

    @property
    def is_here(self) -> bool:
        """Whether the owner is a process of this machine."""
        return self.host == socket.gethostname()

    def runs_here(self) -> bool:
        """Return whether an owner on this machine still runs."""
        return _is_running(self.process) and self.started in (0, _start_of(self.process))

    def is_alive(self, file: Path) -> bool:
        """Return whether the owner still runs; of one on another machine its ``file`` tells."""
        if self.is_here:
            return self.runs_here()
        with suppress(OSError):
            return time.time() - file.stat().st_mtime < DEAD_SECONDS
        return False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} ({self.work})"


def _start_of(process: int) -> int:
    with suppress(ValueError, IndexError):
        return int(_status_of(process)[19])
    return 0


def _state_of(process: int) -> str:
    return next(iter(_status_of(process)), "")


def _status_of(process: int) -> list[str]:
    # the name of the program stands in brackets, and may hold spaces and brackets itself
    with suppress(OSError, ValueError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        # it runs as somebody else
        return True
    return _state_of(process) not in ENDED


def _owners(folder: Path) -> list[tuple[int, Path]]:
    """Return number and path of every owner's file in a folder, the highest number first."""
    found = [(int(match[1]), path) for path in folder.glob(f"{OWNER_PREFIX}*") if (match := OWNER.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _read(file: Path) -> Owner | None:
    """Return the owner that a file names; None for a file that is gone, damaged or not yet written."""
    try:
        return msgspec.json.decode(read_bounded(file, OWNER_BYTES), type=Owner)
    except (FastmemError, msgspec.DecodeError, RecursionError):
        return None


def living_owner(folder: Path, but: Path | None = None) -> Owner | None:
    """Return the process that works in a folder now, other than the owner of the file ``but``; None for nobody."""
    for _, file in _owners(folder):
        owner = None if file == but else _read(file)
        if owner is not None and owner.is_alive(file):
            return owner
    return None


def _alone() -> tuple[int, int]:
    return 1, 1


@contextmanager
def owned(folder: Path, work: str, ranks: Callable[[], tuple[int, int]] = _alone) -> Iterator[None]:
    """Take a folder for this process while entered, and give it back on leaving.

    What a killed process left half written there is removed. A folder that this process has taken already stays its.
    What reporters are told within is logged in the folder, for `fastmem status`.

    Args:
        folder: the folder; made where it is missing.
        work: what is done there, in a word or two, for the message that others get.
        ranks: gives how many processes share the work, and how many of them are alive.

    Raises: UsageError where another process works there, which it names, the folder cannot be written, or it was
    removed before the work was done.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = str(folder.resolve())
        me = Owner.this_process(work)
        file = None if key in _HELD else _take(folder, me)
    except OSError as error:
        raise UsageError(
            f"expected a folder that can be written, got {folder} ({error.strerror or error}): choose another --out or "
            "change its rights"
        ) from error
    if file is None:
        yield
        return
    _HELD.add(key)
    stopped = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, stopped), daemon=True)
    beat.start()
    ended = False
    try:
        remove_leftovers(folder)
        with logged(ProgressLog(folder, work, me.host, me.process, me.since, ranks)):
            yield
            if not file.exists():
                raise UsageError(
                    f"expected {folder} to stay while it is worked in, got it removed or emptied in the middle: run "
                    "the command again, with --resume where something is left there"
                )
        ended = True
    finally:
        stopped.set()
        _HELD.discard(key)
        with suppress(OSError):
            file.unlink()
            # nothing came of it
            if not ended and [path.name for path in folder.iterdir()] == [LOG_NAME]:
                (folder / LOG_NAME).unlink()
            if made:
                folder.rmdir()


# folders that this process has taken
_HELD: set[str] = set()


def _take(folder: Path, me: Owner) -> Path:
    while True:
        before = _owners(folder)
        _refuse_living(folder)
        number = before[0][0] + 1 if before else 1
        file = folder / f"{OWNER_PREFIX}{number}"
        # the content is there from the first moment: a link appears whole, or not at all
        own = folder / f"{OWNER_PREFIX}new-{os.urandom(8).hex()}"
        try:
            with open(own, "x") as made:
                made.write(json.dumps(asdict(me)))
            _appear(own, file)
        except FileExistsError:
            continue
        finally:
            own.unlink(missing_ok=True)
        try:
            # who looked at an older listing may have made a file of another number
            _refuse_living(folder, but=file)
        except UsageError:
            file.unlink(missing_ok=True)
            raise
        for _, old in before:
            old.unlink(missing_ok=True)
        return file


def _appear(own: Path, file: Path) -> None:
    try:
        os.link(own, file)
    except FileExistsError:
        raise
    except OSError:
        # a file system without links: made new, then filled
        with open(file, "x") as made:
            made.write(own.read_text())


def _refuse_living(folder: Path, but: Path | None = None) -> None:
    owner = living_owner(folder, but)
    if owner is not None:
        raise UsageError(
            f"expected a folder that nobody works in, got {folder}, which {owner} has: wait for it, or choose another "
            "--out"
        )


def _beat(file: Path, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(file)
