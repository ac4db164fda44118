"""Progress of long work on stderr: a bar with an estimate on a terminal, a line twice a minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastmem.cli.options import say
from fastmem.scoring.settings import Reporter, ScorePlan, TokenPlan

LINE_SECONDS = 30.0


@contextmanager
def report_progress() -> Iterator[Reporter]:
    """A reporter for a scoring pass."""
    with image_progress() as (start, advance):

        def planned(plan: ScorePlan) -> None:
            say(describe(plan))
            start(plan.images + plan.heldout_images)

        yield Reporter(note=say, planned=planned, advance=advance)


@contextmanager
def image_progress(things: str = "images") -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Two functions: one that starts the count to a number of images, and one that tells how many more are done.

    things: what is counted, where it is not images.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    lines = _Lines(things)

    def start(total: int) -> None:
        lines.start(total)
        bar.start()
        bar.add_task(things, total=total)

    def advance(images: int) -> None:
        if console.is_terminal:
            bar.advance(bar.task_ids[0], images)
        else:
            lines.advance(images)

    try:
        yield start, advance
    finally:
        bar.stop()


def describe(plan: ScorePlan) -> str:
    """One line before long work: images, views, bytes on disk, and how long at the measured speed."""
    images = f"{plan.images:,} images" + (f" + {plan.heldout_images:,} held-out" if plan.heldout_images else "")
    views = f"{plan.views} view{'s' * (plan.views > 1)}"
    disk = f", about {size(plan.disk_bytes)} on disk" if plan.disk_bytes else ""
    time_left = f", about {duration(plan.seconds)} at the measured speed" if plan.seconds is not None else ""
    return f"scoring {images} with {views} each{disk}{_describe_tokens(plan.tokens)}{time_left}"


def _describe_tokens(tokens: TokenPlan) -> str:
    if tokens.folder is None:
        return ""
    there = f" ({tokens.stored:.0%} of them there)" if tokens.stored else ""
    return f", {size(tokens.total_bytes)} of tokens in {tokens.folder}{there}"


class _Lines:
    """A line of progress from time to time, for logs."""

    def __init__(self, things: str) -> None:
        self.things = things

    def start(self, total: int) -> None:
        self.total, self.done, self.here = total, 0, 0
        self.started = self.said = time.monotonic()

    def advance(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        # what a resumed run brings along arrives at once and says nothing about the speed
        self.here += images if now - self.started > 0.5 else 0
        if now - self.said < LINE_SECONDS or not self.here:
            return
        self.said = now
        speed = self.here / (now - self.started)
        time_left = duration((self.total - self.done) / speed)
        say(f"{self.done:,} of {self.total:,} {self.things}, {speed:.3g} {self.things}/s, about {time_left} left")


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
