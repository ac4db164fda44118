"""How long work tells what it is about to do and how far it is; every stage takes one reporter."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol


class Plan(Protocol):
    """What a piece of work will take; ``str(plan)`` is one line for people, empty where there is nothing to say.

    total: how many things will be done; things: what they are, in the plural, such as "images".
    """

    @property
    def total(self) -> int: ...

    @property
    def things(self) -> str: ...


@dataclass(frozen=True)
class Work:
    """A plan that is only a count.

    total: how many things will be done; things: what they are, in the plural; sentence: one line about them.
    """

    total: int
    things: str = "images"
    sentence: str = ""

    def __str__(self) -> str:
        return self.sentence


class Hearer(Protocol):
    """What else hears how far work is, beside the reporter that its caller gave: the log in the work's folder."""

    def planned(self, plan: Plan) -> None: ...

    def advance(self, done: int) -> None: ...

    def skipped(self, count: int) -> None: ...


_HEARER: ContextVar[Hearer | None] = ContextVar("hearer", default=None)


@contextmanager
def heard_by(hearer: Hearer | None) -> Iterator[None]:
    """While entered, ``hearer`` hears what every reporter is told here, in place of one before; None for nobody."""
    token = _HEARER.set(hearer)
    try:
        yield
    finally:
        _HEARER.reset(token)


def tell_skipped(count: int) -> None:
    """Tell who hears this work that ``count`` more of its images could not be read."""
    hearer = _HEARER.get()
    if hearer is not None and count:
        hearer.skipped(count)


def _nothing(*arguments: Any) -> None:
    """What a reporter does that nobody listens to."""


@dataclass(frozen=True)
class _Heard:
    """A reporter's function that who hears the work hears too."""

    name: str
    tell: Callable[[Any], None]

    def __call__(self, what: Any) -> None:
        hearer = _HEARER.get()
        # a reporter may be made of another one, and is heard once
        with heard_by(None):
            if hearer is not None:
                getattr(hearer, self.name)(what)
            self.tell(what)


@dataclass(frozen=True)
class Reporter:
    """Functions that long work calls while it runs; by default they do nothing.

    Attributes:
        note: gets one sentence that a person should read.
        planned: gets the plan of each piece of work before it starts, several in turn where a stage does several.
        advance: gets how many more things of the latest plan are done.
        heard: whether the log in the folder of the work hears of plans and progress, too.
    """

    note: Callable[[str], None] = field(default=_nothing)
    planned: Callable[[Plan], None] = field(default=_nothing)
    advance: Callable[[int], None] = field(default=_nothing)
    heard: bool = True

    def __post_init__(self) -> None:
        for name in ("planned", "advance") if self.heard else ():
            object.__setattr__(self, name, _Heard(name, getattr(self, name)))


# for a part of work whose caller tells of it, and for a stage, of which only the log in its folder hears
SILENT, QUIET = Reporter(heard=False), Reporter()

# control characters, those that only change how others are shown, halves of characters, and ends of lines
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
# many scripts are written with these two
JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""The text on one line, with an escape such as ``\n`` or ``\u202e`` for what would act, not show."""
    return "".join(map(printable_character, text))


def printable_character(character: str) -> str:
    """The character itself, or its escape where it would act, not show."""
    acts = unicodedata.category(character) in UNSEEN and character not in JOINERS
    return escape(character) if acts else character


def escape(character: str) -> str:
    r"""The character as Python writes it in a string of ASCII, such as ``\x1b`` or ``\u732b``."""
    return character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else repr(character)[1:-1]


def count_of(number: int, thing: str) -> str:
    """A number with its noun: ``1 image``, ``2,000 images``."""
    return f"{number:,} {thing}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def time_left(seconds: float | None) -> str:
    """The end of a plan's sentence: how long the work will take; empty where no speed was measured."""
    return "" if seconds is None else f", about {duration(seconds)} at the measured speed"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
