"""Bench rows: every number with the hardware, the versions and the commit it was measured on."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, str]:
    """Processor, cores, torch and the commit, "+" where the tree has changes."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
    }


def append_row(bench: str, row: Mapping[str, object]) -> Path:
    """Add one row to benches/results/BENCH.csv. Raises: SystemExit where the file has other columns."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{bench}.csv"
    full = {**describe_machine(), **row}
    is_new = not path.exists()
    if not is_new and path.read_text().splitlines()[0].split(",") != list(full):
        raise SystemExit(f"expected the columns {', '.join(full)} in {path}, got others: move that file away")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(full))
        if is_new:
            writer.writeheader()
        writer.writerow(full)
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
