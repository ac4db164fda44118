"""Ctrl-C during long work: the work stops where what it has done is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interruption:
    """While entered, Ctrl-C only sets ``requested``, so that work can stop where its state is whole.

    A second Ctrl-C stops at once. Outside the main thread Ctrl-C is left as it is.
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
