"""The operators in plain torch, which specify what every other backend computes and is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Span = tuple[int, int]


def segment_abs_mean(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    """Mean of ``|hidden|`` over each of S spans (start, stop): float [N, positions, units] to float32 [N, S, units].

    Source: arXiv 2509.00488, which takes the absolute value before any averaging.
    """
    # a span of one position is the usual case (RAR's last): no sum, no copy of the other positions
    return torch.stack([hidden[:, start:stop].float().abs().mean(dim=1) for start, stop in spans], dim=1)


def fc1_response(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    spans: Sequence[Span],
    gelu: str,
    *,
    pre_activation: bool = False,
    keep_hidden: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """First linear layer of an MLP, its GELU, and each unit's mean absolute activation over each span.

    Args:
        x: float [N, positions, width].
        weight: W, [units, width], in x's dtype.
        bias: b, [units], in x's dtype.
        spans: S pairs (start, stop) of positions, which may overlap.
        gelu: "none" for the exact function, "tanh" for its approximation, as ``torch.nn.functional.gelu`` names them.
        pre_activation: respond with ``|x W^T + b|`` in place of ``|GELU(x W^T + b)|``.
        keep_hidden: return the hidden layer too; False where only the responses are wanted.

    Returns:
        The hidden layer GELU(x W^T + b), [N, positions, units] in x's dtype, or None, and the responses float32
        [N, S, units].
    """
    linear = functional.linear(x, weight, bias)
    hidden = functional.gelu(linear, approximate=gelu)
    return hidden if keep_hidden else None, segment_abs_mean(linear if pre_activation else hidden, spans)


def scale_rows_(weights: Sequence[Tensor], rows: Sequence[Tensor], factor: float) -> None:
    """Multiply the chosen ``rows``, int64 [n], of each of the ``weights`` [height, width] by a factor, in place."""
    for weight, chosen in zip(weights, rows, strict=True):
        weight[chosen.to(weight.device)] *= factor
