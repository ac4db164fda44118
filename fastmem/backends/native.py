"""The compiled operators (C++ on the CPU, CUDA on the GPU): loaded when first asked for; if not, the reason is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmem.errors import UsageError

FOLDER = Path(__file__).parent
RECORD = "native_build.json"


@dataclass(frozen=True)
class NativeStatus:
    """Which libraries are loaded, and in a sentence why not the others.

    ``cuda`` says that the GPU code is loaded, which needs no GPU; ``reason`` is empty when both are.
    """

    cpu: bool
    cuda: bool
    reason: str
    folder: Path


_status: NativeStatus | None = None


def status() -> NativeStatus:
    """Load the libraries on the first call and say which ones there are; never raises for a missing library."""
    global _status
    if _status is None:
        _status = load(FOLDER)
        if _status.cpu:
            torch.library.register_fake("fastmem::segment_abs_mean", _segment_abs_mean_shape)
    return _status


def load(folder: Path) -> NativeStatus:
    """Load what a folder has of the two libraries; ``status`` does that once for the installed ones."""
    recorded = _read_record(folder)
    cpu_reason = _load_library(folder, "cpu", recorded)
    # the CUDA library adds a kernel to the operator that the CPU library defines: without that it means nothing
    cuda_reason = cpu_reason or _load_library(folder, "cuda", recorded)
    return NativeStatus(cpu=not cpu_reason, cuda=not cuda_reason, reason=cuda_reason, folder=folder)


def segment_abs_mean(hidden: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Mean over each span of positions of abs(hidden), without writing abs(hidden) anywhere.

    hidden: float32 [images, positions, units], contiguous, on the CPU or a CUDA device.
    spans: (start, stop) pairs, stop excluded, at least one; they may overlap.

    Returns float32 [images, spans, units]. The order of the additions depends on the span alone, so any number of
    threads gives the same bits. No gradient flows through it.

    Raises: UsageError when the library for the tensor's device is not there, or an argument does not fit.
    """
    found = status()
    device = hidden.device.type
    if not (found.cpu if device == "cpu" else found.cuda and device == "cuda"):
        why = found.reason if device in ("cpu", "cuda") else "there are only CPU and CUDA ones"
        raise UsageError(f"no native operator can run on a tensor on {device!r}: {why}; choose another backend")
    _check(hidden, spans)
    starts, stops = zip(*spans, strict=True)
    return torch.ops.fastmem.segment_abs_mean(hidden, starts, stops)


def _check(hidden: torch.Tensor, spans: Sequence[tuple[int, int]]) -> None:
    # the library checks the same before it touches memory, but its messages carry file and line
    if hidden.dtype != torch.float32 or hidden.dim() != 3 or not hidden.is_contiguous():
        raise UsageError(
            "segment_abs_mean expected contiguous float32 [images, positions, units], got "
            f"{hidden.dtype} {list(hidden.shape)} with strides {hidden.stride()}; use .float().contiguous()"
        )
    if not spans:
        raise UsageError("segment_abs_mean expected at least one (start, stop) span, got none; name a segment")
    positions = hidden.shape[1]
    for start, stop in spans:
        if not 0 <= start < stop <= positions:
            raise UsageError(
                f"segment_abs_mean expected spans with 0 <= start < stop <= {positions}, got ({start}, {stop}); "
                "take them from the model's segments"
            )


def _segment_abs_mean_shape(hidden: torch.Tensor, starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], len(starts), hidden.shape[2])


def _load_library(folder: Path, part: str, recorded: dict[str, str]) -> str:
    """Load one library; returns why that is not possible, or an empty string."""
    library = folder / f"_fastmem_{part}.so"
    if not library.is_file():
        why = recorded.get(part) or "run pip install --no-build-isolation on the source"
        return f"the native {part} operators are not built: {why}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        built_with = recorded.get("torch", "an unknown version")
        return f"{library} (built with torch {built_with}) does not load into torch {torch.__version__}: {error}"
    return ""


def _read_record(folder: Path) -> dict[str, str]:
    try:
        recorded = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}
