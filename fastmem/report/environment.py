"""What a stage runs with: versions and hardware, for its document."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from fastmem import __version__

CPU_INFO = Path("/proc/cpuinfo")
DISTRIBUTIONS = ("torch", "triton", "numpy", "faiss-cpu", "faiss-gpu")


def environment(device: str) -> dict[str, str]:
    """Versions and hardware of a stage that runs on a device such as "cpu" or "cuda:0", by name."""
    found = {"fastmem": __version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    # runs of a GPU can be merged on a machine without one
    if device.startswith("cuda") and torch.cuda.is_available():
        found["hardware"] = torch.cuda.get_device_name(device)
    else:
        found["hardware"] = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return found


def _processor() -> str:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "a processor without a name")
