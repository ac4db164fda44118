"""The operators in C++ on the CPU; :mod:`fastmem.backends.plain` says what each does."""

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
    """The library's matrix product and one pass over it; 16-bit inputs, which no operator takes, in plain torch.

    Arguments and results: as :func:`fastmem.backends.plain.fc1_response`.
    """
    if x.dtype != torch.float32:
        return plain.fc1_response(x, weight, bias, spans, gelu, pre_activation=pre_activation, keep_hidden=keep_hidden)
    linear = functional.linear(x, weight)
    response = native.bias_gelu_response_(linear, bias, spans, gelu, pre_activation)
    # the product has become the hidden layer
    return linear if keep_hidden else None, response
