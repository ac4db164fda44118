"""The operators in plain torch: the readable specification that every other backend is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Span = tuple[int, int]


def segment_abs_mean(hidden: Tensor, spans: Sequence[Span]) -> Tensor:
    """Mean of ``|hidden|`` over the positions of each span.

    hidden: float [N, positions, units]; spans: S pairs (start, stop) of positions. Returns float32 [N, S, units].

    Source: arXiv 2509.00488: the absolute value is taken before any averaging.
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

    x: float [N, positions, width]; weight: [units, width]; bias: [units]; spans: S pairs (start, stop) of positions;
    gelu: "none" (exact, erf) or "tanh", as ``torch.nn.functional.gelu`` names them; pre_activation: respond with
    ``|x W^T + b|`` instead of ``|GELU(x W^T + b)|``; keep_hidden: False when only the responses are wanted.

    Returns hidden = GELU(x W^T + b) as [N, positions, units] in x's dtype or None, and responses as float32 [N, S,
    units].
    """
    linear = functional.linear(x, weight, bias)
    hidden = functional.gelu(linear, approximate=gelu)
    return hidden if keep_hidden else None, segment_abs_mean(linear if pre_activation else hidden, spans)


def scale_rows_(weights: Sequence[Tensor], rows: Sequence[Tensor], factor: float) -> None:
    """``weight[rows] *= factor`` for each matrix [height, width] and its rows int64 [n], in place."""
    for weight, chosen in zip(weights, rows, strict=True):
        weight[chosen.to(weight.device)] *= factor
