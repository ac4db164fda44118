"""The compiled operators, in C++ for the CPU and in CUDA for GPUs.

The libraries are loaded when an operator is first asked for. Where one cannot be loaded, the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_bounded

FOLDER = Path(__file__).parent
RECORD, RECORD_BYTES = "native_build.json", 2**20


@dataclass(frozen=True)
class NativeStatus:
    """Which of the compiled libraries are loaded.

    Attributes:
        cpu: the operators for the CPU are loaded.
        cuda: the operators for GPUs are loaded, which needs no GPU.
        reason: why one is not, in a sentence; empty when both are.
        folder: where the libraries lie.
    """

    cpu: bool
    cuda: bool
    reason: str
    folder: Path


_status: NativeStatus | None = None


def status() -> NativeStatus:
    """Which libraries are there; they are loaded on the first call, and a missing one is no error."""
    global _status
    if _status is None:
        _status = load(FOLDER)
        if _status.cpu:
            for name, fake in FAKES.items():
                torch.library.register_fake(f"fastmem::{name}", fake)
    return _status


def load(folder: Path) -> NativeStatus:
    """Load those of the two libraries that a folder has."""
    recorded = _read_record(folder)
    cpu_reason = _load_library(folder, "cpu", recorded)
    # the CUDA library adds a kernel to an operator that the CPU library defines: without that it means nothing
    cuda_reason = cpu_reason or _load_library(folder, "cuda", recorded)
    return NativeStatus(cpu=not cpu_reason, cuda=not cuda_reason, reason=cuda_reason, folder=folder)


def bias_gelu_response_(
    linear: torch.Tensor,
    bias: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    gelu: str,
    pre_activation: bool = False,
) -> torch.Tensor:
    """Replace the matrix product of fc1 by ``GELU(linear + bias)`` in place, and return each unit's responses.

    The results have the same bits for any number of threads.

    Args:
        linear: float32 [images, positions, units] on the CPU, contiguous, the product without bias.
        bias: float32 [units].
        spans: (start, stop) pairs of positions, at least one.
        gelu: "none" for the exact function, "tanh" for its approximation.
        pre_activation: respond with ``|linear + bias|`` in place of ``|GELU(linear + bias)|``.

    Returns:
        The mean absolute value over each span, float32 [images, spans, units].

    Raises:
        UsageError: the library is not there, or an argument does not fit.
    """
    _check_device(linear, ("cpu",))
    _check(linear, spans)
    if bias.dtype != torch.float32 or bias.shape != linear.shape[2:] or not bias.is_contiguous():
        raise UsageError(
            f"bias_gelu_response_ expected bias as contiguous float32 [{linear.shape[2]}], got {bias.dtype} "
            f"{list(bias.shape)}; give it one value for each unit"
        )
    starts, stops = zip(*spans, strict=True)
    return torch.ops.fastmem.bias_gelu_response_(linear, bias, starts, stops, gelu == "tanh", pre_activation)


def unit_update_(
    mean: torch.Tensor,
    m2: torch.Tensor,
    view_total: torch.Tensor,
    top_value: torch.Tensor,
    top_image: torch.Tensor,
    count: int,
    responses: torch.Tensor,
    image_ids: torch.Tensor,
) -> None:
    """Fold the responses of a batch of images into the statistics of ``count`` images, in place.

    All tensors are on the CPU, and those of the statistics are contiguous; "..." are layers, segments and units.

    Args:
        mean: float64 [...], the mean response of each unit.
        m2: float64 [...], the sum of squared deviations from it.
        view_total: float64 [...], the sum over images of the variance over views.
        top_value: float32 [..., k], the k largest responses, best first.
        top_image: int64 [..., k], the ids of their images.
        count: images in the statistics before.
        responses: float32 [images, views, ...].
        image_ids: int64 [images].

    Raises:
        UsageError: the library is not there.
        RuntimeError: a shape or type does not fit.
    """
    _check_device(mean, ("cpu",))
    torch.ops.fastmem.unit_update_(
        mean, m2, view_total, top_value, top_image, count, responses.contiguous(), image_ids.contiguous()
    )


def scale_rows_(weights: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply chosen rows of many matrices by a factor in place, in one launch on a GPU, with the same bits as torch.

    ``weights`` are contiguous [height, width] each, of one type (float32, float64, bfloat16 or float16) on one device.
    ``rows`` are int64 [n] for each of them, every row at most once.

    Raises:
        UsageError: the library for the device is not there.
        RuntimeError: an argument does not fit.
    """
    if not weights:
        return
    _check_device(weights[0])
    stops = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
    torch.ops.fastmem.scale_rows_(list(weights), torch.cat([r.cpu() for r in rows]), stops, factor)


def _check_device(tensor: torch.Tensor, homes: Sequence[str] = ("cpu", "cuda")) -> None:
    found = status()
    device = tensor.device.type
    if device not in homes or not (found.cpu if device == "cpu" else found.cuda):
        why = found.reason if device in homes else f"there are only {' and '.join(map(str.upper, homes))} ones"
        raise UsageError(f"no native operator can run on a tensor on {device!r}: {why}; choose another backend")


def _check(linear: torch.Tensor, spans: Sequence[tuple[int, int]]) -> None:
    # the library checks the same before it touches memory, but its messages carry file and line
    if linear.dtype != torch.float32 or linear.dim() != 3 or not linear.is_contiguous():
        raise UsageError(
            f"bias_gelu_response_ expected contiguous float32 [images, positions, units], got "
            f"{linear.dtype} {list(linear.shape)} with strides {linear.stride()}; use .float().contiguous()"
        )
    if not spans:
        raise UsageError("bias_gelu_response_ expected at least one (start, stop) span, got none; name a segment")
    positions = linear.shape[1]
    for start, stop in spans:
        if not 0 <= start < stop <= positions:
            raise UsageError(
                f"bias_gelu_response_ expected spans with 0 <= start < stop <= {positions}, got ({start}, {stop}); "
                "take them from the model's segments"
            )


def _bias_gelu_response_shape(
    linear: torch.Tensor,
    bias: torch.Tensor,
    starts: Sequence[int],
    stops: Sequence[int],
    tanh: bool,
    pre_activation: bool,
) -> torch.Tensor:
    return linear.new_empty(linear.shape[0], len(starts), linear.shape[2])


def _nothing(*arguments: object) -> None:
    """The shape of no result, for operators that return nothing."""


# shapes of the results, for torch.compile
FAKES: dict[str, Callable[..., torch.Tensor | None]] = {
    "bias_gelu_response_": _bias_gelu_response_shape,
    "unit_update_": _nothing,
    "scale_rows_": _nothing,
}


def _load_library(folder: Path, part: str, recorded: dict[str, str]) -> str:
    """Load one library; returns the reason where that is not possible, else an empty string."""
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
    # without a record nothing is known of the libraries, which are looked for all the same
    try:
        return msgspec.json.decode(read_bounded(folder / RECORD, RECORD_BYTES), type=dict[str, str])
    except (InputFileError, msgspec.DecodeError, RecursionError):
        return {}
