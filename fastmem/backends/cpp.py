"""The operator fc1_response for the CPU, with its GELU and responses in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastmem.backends import native, plain


def fc1_response(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    spans: Sequence[plain.Span],
    gelu: str,
    *,
    pre_activation: bool = False,
    keep_hidden: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """First linear layer of an MLP, its GELU, and each unit's mean absolute activation over each span.

    The matrix product is torch's, and what follows is one pass over it in C++. Inputs of 16 bits, which the C++ code
    does not take, go through plain torch.

    Args:
        x: float [N, positions, width].
        weight: [units, width].
        bias: [units].
        spans: S pairs (start, stop) of positions.
        gelu: "none" for the exact function, "tanh" for its approximation.
        pre_activation: respond with the input of the GELU in place of its output.
        keep_hidden: return the hidden layer too.

    Returns:
        The hidden layer [N, positions, units] in x's dtype, or None, and the responses float32 [N, S, units].

    Raises:
        UsageError: the C++ code is not there, or an argument does not fit.
    """
    if x.dtype != torch.float32:
        return plain.fc1_response(x, weight, bias, spans, gelu, pre_activation=pre_activation, keep_hidden=keep_hidden)
    linear = functional.linear(x, weight)
    response = native.bias_gelu_response_(linear, bias, spans, gelu, pre_activation)
    # the product has become the hidden layer
    return linear if keep_hidden else None, response
