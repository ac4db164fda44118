"""Let long work finish its current step when it is told to stop, and stop where its results so far are complete.

Ctrl-C (SIGINT), what a scheduler sends (SIGTERM) and a terminal that goes away (SIGHUP) are treated alike.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Windows has no SIGHUP
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# exit code of a process that Ctrl-C ended
INTERRUPTED = 130


class Stopped(KeyboardInterrupt):
    """The process was told to stop, by the signal of this ``number``."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = int(number)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ends so: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.number


def _can_handle(number: int) -> bool:
    # what is ignored from the start stays ignored: nohup, or a job that a script started in the background
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) is not signal.SIG_IGN


@contextmanager
def stopping() -> Iterator[None]:
    """While entered, the first signal raises `Stopped`, and one more ends the process at once without a traceback.

    For the main thread of a program; elsewhere nothing changes.
    """
    told = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            # what is being left is either complete or will be made again
            os._exit(128 + number)
        told = True
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS if _can_handle(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruption:
    """A context manager in which the first signal only asks, so that work can stop at a point it chooses.

    A second one raises `Stopped` at once, and a third ends the process. Outside the main thread signals work as usual.
    """

    def __init__(self) -> None:
        self.requests: list[int] = []

    @property
    def requested(self) -> bool:
        """Whether the process was told to stop."""
        return bool(self.requests)

    @property
    def stopped(self) -> Stopped:
        """What to raise at the chosen point."""
        return Stopped(*self.requests[:1])

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._request) for number in SIGNALS if _can_handle(number)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requests.append(number)
        if len(self.requests) > 2:
            os._exit(128 + number)
        if len(self.requests) == 2:
            raise Stopped(number)
