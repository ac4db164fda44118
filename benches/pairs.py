"""Timing in interleaved rounds: contestants in turn, so that a busy machine slows all, and ratios within rounds."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

RESAMPLES = 10_000


def time_rounds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds float64 [rounds] of every contestant, called in turn; the order turns round after every round."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # once each for caches and allocations
    for name in names:
        contestants[name]()
    for i in range(rounds):
        for name in names if i % 2 else names[::-1]:
            started = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def median_ratio(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Median of first / second over the rounds, and its 95 % bootstrap interval."""
    ratios = first / second
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)
