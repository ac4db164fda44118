"""The exceptions of fastmem: each message says what was expected, what came instead, and what to do."""

from __future__ import annotations

from fastmem.reporter import printable


class FastmemError(Exception):
    """Base class of every error that fastmem raises on purpose.

    The command line prints the message without a traceback and ends with ``exit_code``.
    """

    exit_code = 2

    def __str__(self) -> str:
        # names of files and classes stand in messages, and may hold anything
        return printable(super().__str__())


class UsageError(FastmemError):
    """A wrong option, name, shape or combination, which the caller can correct (exit code 2)."""


class InputFileError(FastmemError):
    """An input file that is missing, unreadable or damaged (exit code 3)."""

    exit_code = 3
