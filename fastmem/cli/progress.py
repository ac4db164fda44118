"""Progress of long work on stderr: a bar with an estimate on a terminal, a line twice a minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastmem.cli.options import say
from fastmem.reporter import Plan, Reporter, duration

LINE_SECONDS = 30.0


@contextmanager
def terminal_reporter() -> Iterator[Reporter]:
    """A reporter that prints notes and plans on stderr, and shows how far the latest plan is."""
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    shown = _Bar(console) if console.is_terminal else _Lines()

    def planned(plan: Plan) -> None:
        sentence = str(plan)
        if sentence:
            say(sentence)
        shown.start(plan.total, plan.things)

    try:
        yield Reporter(say, planned, shown.advance)
    finally:
        shown.stop()


class _Bar:
    """A bar on a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=console)

    def start(self, total: int, things: str) -> None:
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        # the terminal may have gone, which is no reason to end the work
        with suppress(OSError):
            self.bar.start()
        self.bar.add_task(things, total=total)

    def advance(self, done: int) -> None:
        for task in self.bar.task_ids:
            self.bar.advance(task, done)

    def stop(self) -> None:
        with suppress(OSError):
            self.bar.stop()


class _Lines:
    """A line of progress from time to time, for logs."""

    def __init__(self) -> None:
        self.start(0, "")

    def start(self, total: int, things: str) -> None:
        self.total, self.things, self.done, self.here = total, things, 0, 0
        self.started = self.said = time.monotonic()

    def advance(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        # what a resumed run brings along arrives at once and says nothing about the speed
        self.here += done if now - self.started > 0.5 else 0
        if now - self.said < LINE_SECONDS or not self.here:
            return
        self.said = now
        speed = self.here / (now - self.started)
        left = duration((self.total - self.done) / speed)
        say(f"{self.done:,} of {self.total:,} {self.things}, {speed:.3g} {self.things}/s, about {left} left")

    def stop(self) -> None:
        """Nothing is left to be taken off the screen."""
