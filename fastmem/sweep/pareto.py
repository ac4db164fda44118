"""The front of a table: edits that no other beats in both what is extracted and what it costs."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(extracted: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the rows that no other equals or beats in both numbers, and beats in one; cheapest first.

    Of rows that are equal in both the first stands for all.
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], extracted[i], i)):
        if not front or extracted[i] < extracted[front[-1]]:
            front.append(i)
    return front
