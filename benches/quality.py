"""The metrics of images against torch-fidelity's own functions, on the same 10,000 features of Inception's size.

Rows: the moments for FID, of batches of 64 and of one batch; the Frechet distance of two Gaussians; KID over 100
subsets of 1,000. Beside each ratio ours / theirs stands the limit: the time of the matrix products alone that the
metric needs, as a share of theirs. torch-fidelity gathers features before it computes moments, so the same function is
its peer for batches and for one batch; batches are joined inside its time.

``python benches/quality.py [NAME ...]`` measures these rows only; FASTMEM_PAIRS is another number of pairs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from pairs import PAIRS, compare, require_green
from rows import append_row
from scipy.linalg import blas
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from fastmem.quality.frechet import FeatureMoments, Gaussian, frechet_distance
from fastmem.quality.kernel import SUBSET_SIZE, SUBSETS, kernel_subsets

IMAGES, DIMENSIONS, BATCH = 10_000, 2048, 64
# the products alone are the least of this many runs
LIMIT_RUNS = 5

Call = Callable[[], object]


def features(seed: int) -> np.ndarray:
    """Pooled features as Inception's: not negative, many near zero, correlated; float32 [IMAGES,DIMENSIONS]."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((IMAGES, 256), dtype=np.float32)
    mix = np.random.default_rng(9).standard_normal((256, DIMENSIONS), dtype=np.float32) / 16
    noise = random.standard_normal((IMAGES, DIMENSIONS), dtype=np.float32)
    return np.maximum(0.3 * (hidden @ mix) + 0.15 * noise + 0.35, 0)


def seconds(call: Call) -> float:
    """Least time of a few calls."""
    best = float("inf")
    for _ in range(LIMIT_RUNS):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def moments(batches: list[np.ndarray]) -> Gaussian:
    gathered = FeatureMoments.zero(DIMENSIONS)
    for batch in batches:
        gathered = gathered.update(batch)
    return gathered.finish()


def rows() -> dict[str, tuple[Call, Call, Call]]:
    """By name: our call, theirs, and one that does nothing but the matrix products."""
    first, second = features(0), features(1)
    batches = [first[i : i + BATCH].copy() for i in range(0, IMAGES, BATCH)]
    wide = first.astype(np.float64)
    ours = [moments([side]) for side in (first, second)]
    theirs = [fid_features_to_statistics(torch.from_numpy(side.astype(np.float64))) for side in (first, second)]
    subset = first[:SUBSET_SIZE], second[:SUBSET_SIZE]

    def symmetric_product() -> None:
        blas.dsyrk(1.0, wide.T)

    def subset_products() -> None:
        for _ in range(SUBSETS):
            for one, other in ((0, 0), (1, 1), (0, 1)):
                subset[one] @ subset[other].T

    def eigenproblem() -> None:
        factor = np.linalg.cholesky(ours[0].sigma)
        np.linalg.eigvalsh(factor.T @ ours[1].sigma @ factor)

    return {
        "moments, batches of 64": (
            lambda: moments(batches),
            lambda: fid_features_to_statistics(torch.cat([torch.from_numpy(b) for b in batches])),
            symmetric_product,
        ),
        "moments, one batch": (
            lambda: moments([first]),
            lambda: fid_features_to_statistics(torch.from_numpy(first)),
            symmetric_product,
        ),
        "Frechet distance": (
            lambda: frechet_distance(*ours),
            lambda: fid_statistics_to_metric(*theirs, verbose=False),
            eigenproblem,
        ),
        "KID, 100 subsets of 1,000": (
            lambda: kernel_subsets(first, second),
            lambda: kid_features_to_metric(torch.from_numpy(first), torch.from_numpy(second), verbose=False),
            subset_products,
        ),
    }


def main() -> None:
    require_green(["tests/quality/test_quality.py"])
    pairs = int(os.environ.get("FASTMEM_PAIRS", PAIRS))
    slow = []
    for name, (ours, theirs, limit) in rows().items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        found = compare(ours, theirs, pairs)
        least = seconds(limit)
        print(
            f"{name:28} ours / theirs {found.median:.3f} ({found.low:.3f} to {found.high:.3f}), {found.ours:.2f} and "
            f"{found.theirs:.2f} s; products alone / theirs {least / found.theirs:.3f}",
            flush=True,
        )
        row = {"what": name, "pairs": pairs, "median": round(found.median, 4), "low": round(found.low, 4)}
        row |= {"high": round(found.high, 4), "ours": round(found.ours, 4), "theirs": round(found.theirs, 4)}
        append_row("quality", row | {"products": round(least, 4), "load": round(os.getloadavg()[0], 1)})
        slow += [name] if found.low > 1 else []
    if slow:
        raise SystemExit(f"slower than torch-fidelity: {', '.join(slow)}")


if __name__ == "__main__":
    main()
