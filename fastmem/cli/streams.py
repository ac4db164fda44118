"""The standard streams: they print every character, and a run ends in order where they cannot be written."""

from __future__ import annotations

import io
import os
import select
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import wraps
from typing import NoReturn, Protocol, TextIO

import click

# the code that a shell gives a program whose reader has gone, as 130 stands for Ctrl-C
READER_GONE = 141


class Main(Protocol):
    """A program's main function, which takes the words of its command line."""

    def __call__(self, args: Sequence[str] | None = None) -> None: ...


def prepare_streams() -> None:
    """Make stdout and stderr write an escape for what their encoding lacks, and open those that were closed."""
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def on_prepared_streams(main: Main) -> Main:
    """Make a program's main function prepare the streams, and end with one sentence where stdout cannot be written.

    The exit code is 141 where the reader of stdout has gone, as after ``| head -1``, and 2 for a full disk.
    """

    @wraps(main)
    def run(args: Sequence[str] | None = None) -> None:
        prepare_streams()
        stdout = sys.stdout
        try:
            main(args)
        except OSError as error:
            if not _came_of_printing(error):
                raise
            _end(error)
        except SystemExit:
            # click ends with 1 when any pipe breaks, after it has put another stream in the place of stdout
            if sys.stdout is not stdout and _has_no_reader(stdout):
                _end(BrokenPipeError())
            raise

    return run


def _came_of_printing(error: OSError) -> bool:
    """Whether an error was raised by what prints text, and not by another use of a file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_code is click.echo.__code__ for frame in frames)


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream leads into a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end(error: OSError) -> NoReturn:
    """Exit after a stream could not be written."""
    with suppress(OSError):
        reason = error.strerror or error
        if not isinstance(error, BrokenPipeError):
            print(f"fastmem: expected to be able to print, got {reason}: make room or print elsewhere", file=sys.stderr)
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            stream.flush()
        except (OSError, ValueError):
            # what was not written is dropped, or the interpreter would try once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    # where not even the sentence of an error could be printed, its code stands
    sys.exit(READER_GONE if isinstance(error, BrokenPipeError) else getattr(error.__context__, "exit_code", 2))


def _open_closed() -> None:
    """Open what was closed, as by ``>&-``, or the next file to be opened would get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number is given, and those below are taken
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - kept open
