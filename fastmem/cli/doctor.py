"""``fastmem doctor``."""

from __future__ import annotations

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastmem.cli.command import command as make_command
from fastmem.cli.options import JSON, print_json, tell
from fastmem.errors import UsageError
from fastmem.home import home
from fastmem.models.registry import entries


@make_command("doctor", "doctor", "doctor --json")
@JSON
def command(as_json: bool) -> None:
    """Says what this machine offers, which backend will run, and what is missing."""
    report = examine()
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        if key != "problems":
            tell(f"{key:<10}{value if value not in (None, [], '') else 'none'}")
    tell("", *([] if report["problems"] else ["no problems found"]))
    for problem in report["problems"]:
        tell(f"! {problem}")


def examine() -> dict[str, Any]:
    """What ``fastmem doctor --json`` prints."""
    import torch

    from fastmem.backends import native
    from fastmem.backends.select import choose_backend
    from fastmem.index.embedding import locate
    from fastmem.models.checkpoints import resolve_device
    from fastmem.quality.inception import locate_inception

    device = resolve_device("auto")
    status = native.status()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    problems = []
    try:
        folder: Path | None = home()
        missing = [entry.name for entry in entries().values() if not os.path.isfile(entry.generator_file.path)]
        if missing:
            problems.append(f"no weights in {folder} for {', '.join(missing)}: `fastmem fetch --model NAME` gets them")
    except UsageError as error:
        folder = None
        problems.append(str(error))
    if status.reason:
        problems.append(f"native operators: {status.reason}")
    if not gpus:
        problems.append("no CUDA device: everything runs on the CPU, which is slow for the full-size models")
    sscd, reason = locate()
    if sscd is None:
        problems.append(reason)
    inception, reason = locate_inception()
    if inception is None:
        problems.append(reason)
    if _faiss() is None:
        problems.append("no faiss: `fastmem index` needs it, install faiss-gpu or faiss-cpu")
    return {
        "torch": torch.__version__,
        "triton": _version("triton") if find_spec("triton") else None,
        "native": {"cpu": status.cpu, "cuda": status.cuda},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cores": os.cpu_count(),
        "faiss": _faiss(),
        "sscd": str(sscd) if sscd is not None else None,
        "inception": str(inception) if inception is not None else None,
        "backend": choose_backend("auto", device).name,
        "device": str(device),
        "home": None if folder is None else str(folder),
        "problems": problems,
    }


def _faiss() -> str | None:
    """Version of faiss and where an exact search runs: the builds for GPUs have the same name as those for the CPU."""
    if not find_spec("faiss"):
        return None
    import faiss
    import torch

    from fastmem.index.nearest import gpu_problem

    if not torch.cuda.is_available():
        return f"{faiss.__version__} on the CPU"
    reason = gpu_problem()
    return f"{faiss.__version__} on the GPU" if reason is None else f"{faiss.__version__} on the CPU ({reason})"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
