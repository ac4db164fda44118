"""The one exception family: every error is a sentence that says what was expected, what came, and what to do."""

from __future__ import annotations


class FastmemError(Exception):
    """Base of every error fastmem raises on purpose; the command line prints it without a traceback.

    ``exit_code`` is what the process ends with.
    """

    exit_code = 2


class UsageError(FastmemError):
    """A wrong option, name, shape or combination: the caller can mend the call (exit code 2)."""


class InputFileError(FastmemError):
    """An input file is missing, unreadable or damaged (exit code 3)."""

    exit_code = 3
