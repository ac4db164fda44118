"""Timing on a GPU: events around every call, variants in turn, inputs that do not fit in the second-level cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[int], object]
REPEATS, WARMUPS = 20, 3


def rotate(make: Callable[[], torch.Tensor], least: int = 2) -> list[torch.Tensor]:
    """As many tensors of ``make`` as exceed twice the second-level cache together, at least ``least``."""
    first = make()
    cache = torch.cuda.get_device_properties(first.device).L2_cache_size
    count = max(least, -(-2 * cache // max(1, first.numel() * first.element_size())))
    return [first, *(make() for _ in range(min(count, 16) - 1))]


def time_in_turn(calls: Mapping[str, Call], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Milliseconds of every call, one after the other in each round; a call is given the number of its round."""
    for call in calls.values():
        for round_number in range(WARMUPS):
            call(round_number)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    torch.cuda.synchronize()
    for round_number in range(repeats):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # the GPU waits about two milliseconds, so that the launches between the events are queued before it starts
            torch.cuda._sleep(4_000_000)
            start.record()
            call(round_number)
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def copy_rate() -> float:
    """Bytes a second of a copy of 1 GiB in memory, read plus written."""
    source, target = torch.randn(2**28, device="cuda"), torch.empty(2**28, device="cuda")
    times = time_in_turn({"copy": lambda _: target.copy_(source)})
    return 2 * source.numel() * 4 / (median(times["copy"]) / 1e3)


def product_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of the library's matrix product, 8192 (float32: 4096) cubed, on random values."""
    size = 4096 if dtype == torch.float32 else 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    times = time_in_turn({"product": lambda _: a @ b}, 10)
    return 2 * size**3 / (median(times["product"]) / 1e3)
