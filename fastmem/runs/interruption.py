"""Let long work finish its current step on Ctrl-C, and stop where its results so far are complete."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interruption:
    """A context manager in which the first Ctrl-C only sets ``requested``, so that work can stop at a point it chooses.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread Ctrl-C works as usual.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
