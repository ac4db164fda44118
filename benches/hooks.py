"""Peak memory of keeping activations by forward hooks and reducing afterwards, against streaming them, by image-views.

One layer of VAR-d16's width on its third scale (9 positions), with made-up hidden states. The hook keeps the absolute
activations of every view and reduces them at the end; ours is fc1_response and the running statistics.
Every measurement is a process of its own; its peak is told above what the process needs before the first batch. Both
have to give the same UnitMem to 1e-5. Fails where ours grows by 5 % of the process's peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from pairs import require_green
from rows import append_row
from torch import Tensor, nn
from torch.nn import functional

from fastmem.backends.select import choose_backend
from fastmem.stats.accumulators import Fold, contrast

COUNTS = (500, 2000, 8000)
WIDTH, UNITS, POSITIONS, VIEWS, IMAGES_PER_BATCH = 1024, 4096, 9, 10, 5
MAX_GROWTH, TOLERANCE = 0.05, 1e-5
HOOKS, OURS = "hooks", "ours"


def hidden_states(views: int) -> Iterator[Tensor]:
    """Batches [50,9,1024] of hidden states, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(views // (VIEWS * IMAGES_PER_BATCH)):
        yield torch.randn(VIEWS * IMAGES_PER_BATCH, POSITIONS, WIDTH, generator=generator)


def by_hooks(fc1: nn.Linear, views: int) -> Tensor:
    """UnitMem float64 [units] of what a hook kept."""
    kept: list[Tensor] = []
    fc1.register_forward_hook(lambda module, given, out: kept.append(functional.gelu(out, approximate="tanh").abs()))
    for x in hidden_states(views):
        fc1(x)
    responses = torch.cat(kept).mean(1).unflatten(0, (-1, VIEWS)).double().mean(1)
    return contrast(responses.amax(0), responses.sum(0), len(responses))


def by_streaming(fc1: nn.Linear, views: int) -> Tensor:
    """UnitMem float64 [units] of the running statistics."""
    backend, fold = choose_backend("auto", torch.device("cpu")), Fold.zero((1, 1, UNITS))
    for number, x in enumerate(hidden_states(views)):
        _, response = backend.fc1_response(x, fc1.weight, fc1.bias, [(0, POSITIONS)], "tanh")
        ids = torch.arange(IMAGES_PER_BATCH) + IMAGES_PER_BATCH * number
        fold = fold.update_by(backend.unit_update_, response.view(IMAGES_PER_BATCH, VIEWS, 1, 1, UNITS), ids)
    count = fold.moments.count
    return contrast(fold.largest.value[..., 0].double(), fold.moments.mean * count, count)[0, 0]


@torch.inference_mode()
def measure_here(way: str, views: int, result: str) -> None:
    """Run one way in this process; print its peak, MiB, before and after, and save its UnitMem."""
    torch.manual_seed(0)
    fc1 = nn.Linear(WIDTH, UNITS)
    # loads what either way needs, so that only what it keeps is left to grow
    for run in (by_streaming, by_hooks):
        run(nn.Linear(WIDTH, UNITS), VIEWS * IMAGES_PER_BATCH)
    before = _peak()
    found = by_hooks(fc1, views) if way == HOOKS else by_streaming(fc1, views)
    print(json.dumps([before, _peak()]))
    torch.save(found, result)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, views: int, folder: Path) -> tuple[float, float, Tensor]:
    """Peak before and after in MiB, and UnitMem, of one way in a process of its own."""
    result = folder / f"{way}-{views}.pt"
    command = [sys.executable, __file__, way, str(views), str(result)]
    before, after = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return before, after, torch.load(result, weights_only=True)


def main() -> None:
    import tempfile

    require_green(["tests/stats/test_stats.py", "tests/backends/test_backends.py"])
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for views in COUNTS:
            found = {way: measure(way, views, Path(folder)) for way in (HOOKS, OURS)}
            difference = float((found[HOOKS][2] - found[OURS][2]).abs().max())
            if difference > TOLERANCE:
                raise SystemExit(f"the two ways differ by {difference:.1e} in UnitMem, so their memory says nothing")
            grown = {way: after - before for way, (before, after, _) in found.items()}
            peaks[views] = found[OURS][1]
            print(
                f"{views:>6,} views  hooks +{grown[HOOKS]:,.0f} MiB, ours +{grown[OURS]:,.0f} MiB (a process that has "
                f"done one batch: {found[OURS][0]:,.0f} MiB); UnitMem equal to {difference:.0e}",
                flush=True,
            )
            row = {"views": views, "hooks_mib": round(found[HOOKS][1], 1), "ours_mib": round(found[OURS][1], 1)}
            append_row("hooks", row | {"start_mib": round(found[OURS][0], 1), "difference": f"{difference:.1e}"})
    if max(peaks.values()) > (1 + MAX_GROWTH) * min(peaks.values()):
        raise SystemExit("ours grows with the number of views")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure_here(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main()
