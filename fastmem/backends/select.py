"""Choice of a backend: made once, said once, written into the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastmem.backends import plain
from fastmem.errors import UsageError

NAMES = ("auto", "torch", "cpp")

FC1Response = Callable[[Tensor, Tensor, Tensor, Sequence[plain.Span], str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """The operators of one home; :mod:`fastmem.backends.plain` says what each does."""

    name: str
    fc1_response: FC1Response


def choose_backend(name: str, device: torch.device, pre_activation: bool = False) -> Backend:
    """The backend called ``name``; "auto" takes the best that works on ``device``.

    pre_activation: responses are of fc1's output before the GELU.

    Raises: UsageError for an unknown name, or with the reason why a named backend cannot run; it never falls back.
    """
    from fastmem.backends import native

    if name not in NAMES:
        raise UsageError(f"expected a backend out of {', '.join(NAMES)}, got {name!r}")
    reason = native.status().reason if device.type == "cpu" else f"it runs on the CPU, and the model is on {device}"
    usable = device.type == "cpu" and native.status().cpu
    if name == "cpp" and not usable:
        raise UsageError(f"expected a machine that can run the backend cpp, got none: {reason}; use --backend auto")
    if name == "cpp" or (name == "auto" and usable):
        return Backend("cpp", partial(plain.fc1_response, pre_activation=pre_activation, segment_mean=_native_mean))
    return Backend("torch", partial(plain.fc1_response, pre_activation=pre_activation))


def _native_mean(hidden: Tensor, spans: Sequence[plain.Span]) -> Tensor:
    from fastmem.backends import native

    # the operator takes float32; widening all positions for the few that are read would cost more than it saves
    if hidden.dtype != torch.float32:
        return plain.segment_abs_mean(hidden, spans)
    return native.segment_abs_mean(hidden, spans)
