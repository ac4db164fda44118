"""Interleaved pairs: the ratio of two calls, free of the machine's slow drift, with a bootstrap interval."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAIRS, RESAMPLES = 30, 10_000


@dataclass(frozen=True)
class Ratio:
    """Median of the pair ratios ours / theirs with its 95 % bootstrap interval, and both median times in seconds."""

    median: float
    low: float
    high: float
    ours: float
    theirs: float


def compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int = PAIRS) -> Ratio:
    """Time both calls ``pairs`` times, one right after the other and in changing order."""
    ours()
    theirs()
    times = np.empty((pairs, 2))
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            started = time.perf_counter()
            (ours, theirs)[side]()
            times[pair, side] = time.perf_counter() - started
    ratios = times[:, 0] / times[:, 1]
    resampled = np.random.default_rng(0).choice(ratios, (RESAMPLES, pairs))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    ours_seconds, theirs_seconds = np.median(times, axis=0)
    return Ratio(float(np.median(ratios)), float(low), float(high), float(ours_seconds), float(theirs_seconds))


def require_green(tests: Sequence[str]) -> None:
    """Run the tests of what is measured. Raises: SystemExit on red: a wrong operator gets no number."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *tests]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"the tests are red, so nothing is measured:\n{found.stdout[-2000:]}")
