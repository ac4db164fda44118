"""Choice of a backend, the one that is asked for by name or the fastest that works on a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastmem.backends import plain
from fastmem.errors import UsageError

NAMES = ("auto", "torch", "cpp", "triton")
OLDEST_GPU = (8, 0)

FC1Response = Callable[..., tuple[Tensor | None, Tensor]]
UnitUpdate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor], None]
ScaleRows = Callable[[Sequence[Tensor], Sequence[Tensor], float], None]


@dataclass(frozen=True)
class Backend:
    """The operators of one backend.

    Attributes:
        name: "torch", "cpp" or "triton".
        fc1_response: fastmem.backends.plain.fc1_response, or an operator with the same arguments and results.
        unit_update_: does what fastmem.stats.accumulators.Fold.update does, in place on the fold's tensors; None where
            that method itself is to run.
        scale_rows_: fastmem.backends.plain.scale_rows_, or an operator with the same arguments and results.
        missed: why "auto" did not take a faster backend; empty where it took the fastest or was not asked for.
    """

    name: str
    fc1_response: FC1Response
    unit_update_: UnitUpdate | None = None
    scale_rows_: ScaleRows = plain.scale_rows_
    missed: str = ""


def choose_backend(name: str, device: torch.device, pre_activation: bool = False) -> Backend:
    """The backend called ``name``; "auto" takes the fastest that works on ``device``.

    With ``pre_activation`` its responses are of fc1's output before the GELU.

    Raises:
        UsageError: the name is unknown, or the backend cannot run on the device. A named backend is never replaced by
            another.
    """
    if name not in NAMES:
        raise UsageError(f"expected a backend out of {', '.join(NAMES)}, got {name!r}")
    missed = ""
    if name == "auto":
        name = "triton" if device.type == "cuda" else "cpp"
        missed = REASONS[name](device)
        name = "torch" if missed else name
    reason = REASONS[name](device)
    if reason:
        raise UsageError(f"expected a machine that can run the backend {name}, got none: {reason}; use --backend auto")
    return BUILDERS[name](pre_activation, missed)


def _build_torch(pre_activation: bool, missed: str) -> Backend:
    return Backend("torch", partial(plain.fc1_response, pre_activation=pre_activation), missed=missed)


def _build_cpp(pre_activation: bool, missed: str) -> Backend:
    from fastmem.backends import cpp, native

    fc1_response = partial(cpp.fc1_response, pre_activation=pre_activation)
    return Backend("cpp", fc1_response, native.unit_update_, native.scale_rows_, missed)


def _build_triton(pre_activation: bool, missed: str) -> Backend:
    from fastmem.backends import native
    from fastmem.kernels.fc1_response import fc1_response
    from fastmem.kernels.unit_update import unit_update_

    # the rows are scaled in CUDA C++, which beats Triton there, where nvcc was at hand when fastmem was installed
    scale_rows_ = native.scale_rows_ if native.status().cuda else plain.scale_rows_
    return Backend("triton", partial(fc1_response, pre_activation=pre_activation), unit_update_, scale_rows_, missed)


def _why_not_cpp(device: torch.device) -> str:
    from fastmem.backends import native

    if device.type != "cpu":
        return f"it runs on the CPU, and the model is on {device}"
    status = native.status()
    return "" if status.cpu else status.reason


def _why_not_triton(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"it needs a GPU of compute capability {'.'.join(map(str, OLDEST_GPU))} or newer"
    # Triton's interpreter runs the kernels on the CPU, for tests
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it runs on NVIDIA GPUs, and the model is on {device}"
    try:
        import fastmem.kernels.fc1_response  # noqa: F401
    except ImportError as error:
        return f"it cannot be imported: {error}"
    return ""


REASONS: dict[str, Callable[[torch.device], str]] = {
    "torch": lambda device: "",
    "cpp": _why_not_cpp,
    "triton": _why_not_triton,
}
BUILDERS: dict[str, Callable[[bool, str], Backend]] = {
    "torch": _build_torch,
    "cpp": _build_cpp,
    "triton": _build_triton,
}
