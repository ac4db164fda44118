"""Peak memory of comparing samples with references of 10,000 and 100,000 images: it must not grow with their number.

Each run is its own process: features of a reference lie in a file of Inception's size, 1,000 samples are compared with
it, and FID and KID read the file a block at a time. Prints the peak resident memory of each and their spread, and fails
where that is 10 % or more. ``python benches/quality_memory.py 1281167`` measures another number, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rows import append_row

from fastmem.quality.features import SCHEMA
from fastmem.quality.rows import ChosenRows, write_rows

COUNTS = (10_000, 100_000)
DIMENSIONS, SAMPLES, MAX_SPREAD = 2048, 1000, 0.1
HEADER = {"features": "bench"}
# what the process does: moments of all, and the kernel distance of 1,000 samples from an even part
WORK = f"""
import sys
import numpy as np
from pathlib import Path
from fastmem.quality.features import Features, Reference, compare_by_kernel
from fastmem.quality.frechet import FeatureMoments
from fastmem.quality.rows import blocks
real = Features.load(Path(sys.argv[1]), {HEADER!r})
moments = FeatureMoments.zero(real.vectors.shape[1])
for block in blocks(real.vectors):
    moments = moments.update(block)
moments.finish()
samples = Features(np.random.default_rng(1).random(({SAMPLES}, real.vectors.shape[1]), np.float32))
compare_by_kernel("kid", samples, Reference("bench", "", real))
"""


def peak_memory(count: int, folder: Path) -> tuple[float, float]:
    """Peak resident memory of one comparison in its own process, MiB, and its seconds."""
    path = folder / "features.safetensors"
    some = np.random.default_rng(0).random((4096, DIMENSIONS), np.float32)
    write_rows(path, SCHEMA, HEADER, ChosenRows(some, np.arange(count) % len(some)))
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", WORK, str(path)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the comparison failed with status {status}")
    return usage.ru_maxrss / 1024, time.monotonic() - started


def main() -> None:
    peaks = []
    for count in (*COUNTS, *map(int, sys.argv[1:])):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            peak, seconds = peak_memory(count, Path(folder))
        peaks.append(peak)
        print(f"{count:>9,} images  {peak:8.1f} MiB peak, {seconds:.1f} s", flush=True)
        gib = count * DIMENSIONS * 4 / 2**30
        append_row(
            "quality_memory",
            {"images": count, "features_gib": round(gib, 2), "mib": round(peak, 1), "seconds": round(seconds, 1)},
        )
    spread = max(peaks) / min(peaks) - 1
    print(f"spread {spread:.2%} (allowed: under {MAX_SPREAD:.0%})")
    if spread >= MAX_SPREAD:
        raise SystemExit("peak memory grows with the number of images")


if __name__ == "__main__":
    main()
