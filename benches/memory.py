"""Peak memory of scoring at 200, 800 and 3,200 images: it must not grow with their number.

Each run is its own process on a folder of the embedded pictures, repeated under new names and so under new ids. Prints
the peak resident memory of each and their spread, and fails where that is 5 % or more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rows import append_row

from fastmem.demo.doses import IMAGES

COUNTS = (200, 800, 3200)
VIEWS, BATCH_VIEWS = 2, 16
MAX_SPREAD = 0.05


def write_images(folder: Path, count: int) -> None:
    """``count`` pictures, evenly from all classes; from the second round on under new names."""
    with zipfile.ZipFile(IMAGES) as archive:
        names = [n for n in archive.namelist() if n.startswith("train/") and n.endswith(".png")]
        step = max(1, len(names) // count)
        for i in range(count):
            _, label, name = names[(i * step) % len(names)].split("/")
            place = folder / label
            place.mkdir(parents=True, exist_ok=True)
            (place / f"round-{i * step // len(names)}-{name}").write_bytes(archive.read(f"train/{label}/{name}"))


def peak_memory(data: Path, out: Path) -> float:
    """Peak resident memory of one scoring run in its own process, MiB."""
    command = [sys.executable, "-m", "fastmem", "score", "--model", "rar-tiny", "--data", str(data), "--out", str(out)]
    command += ["--views", str(VIEWS), "--batch-size", str(BATCH_VIEWS), "--workers", "1", "--no-class-check", "--json"]
    # a home of its own, so that every run fills an empty token cache
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"FASTMEM_HOME": f"{out}-home"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"scoring failed with status {status}")
    return usage.ru_maxrss / 1024


def main() -> None:
    peaks = {}
    with tempfile.TemporaryDirectory() as place:
        for count in COUNTS:
            write_images(Path(place, f"data-{count}"), count)
            peaks[count] = peak_memory(Path(place, f"data-{count}"), Path(place, f"run-{count}"))
            print(f"{count:>6,} images  {peaks[count]:8.1f} MiB peak", flush=True)
    spread = max(peaks.values()) / min(peaks.values()) - 1
    print(f"spread {spread:.2%} (allowed: under {MAX_SPREAD:.0%}); rar-tiny, {VIEWS} views, {BATCH_VIEWS} views a pass")
    row = {f"mib_{count}": round(peak, 1) for count, peak in peaks.items()} | {"spread": round(spread, 4)}
    print(f"row added to {append_row('memory', row)}")
    if spread >= MAX_SPREAD:
        raise SystemExit("peak memory grows with the number of images")


if __name__ == "__main__":
    main()
