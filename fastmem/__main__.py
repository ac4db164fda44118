"""``python -m fastmem`` and the command ``fastmem``; a signal while it loads or ends brings no traceback."""

from __future__ import annotations

import os
import signal
from types import FrameType

from fastmem.runs.interruption import SIGNALS


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def main() -> None:
    """Run the command line and exit."""
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        # nothing has been begun that could be kept
        signal.signal(number, _end)
    try:
        from fastmem.cli import main as run

        run()
    finally:
        for number in handled:
            # nothing is left to be kept, and the exit code stands
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
