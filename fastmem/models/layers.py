"""Parts that the generators share: adaLN conditions, the MLP whose units are scored, the cache, the nearest code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# the label of the unconditional branch, in every family
NO_CLASS = -1


class Cache:
    """Keys and values of every layer, allocated once: two tensors [layers, N, heads, positions, head width]."""

    def __init__(self, layers: int, rows: int, heads: int, positions: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_empty(layers, rows, heads, positions, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [N, heads, n, head width] of the positions from ``length`` on; returns all so far."""
        stop = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : stop] = keys
        self.values[layer, :, :, self.length : stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class MLP(nn.Module):
    """fc1, GELU ("none": exact, or "tanh"), fc2; the outputs of fc1 are the *units* that fastmem scores."""

    def __init__(self, width: int, units: int, gelu: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, units)
        self.fc2 = nn.Linear(units, width)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate=self.gelu))


@dataclass(frozen=True)
class Condition:
    """What adaLN sees: one row per *distinct* class, since images of one class share their modulation.

    values: [distinct classes, positions, width], or one position where the modulation is the same at all of them;
    rows: int64 [N], the row of each image, or None where one row serves all images.
    """

    values: Tensor
    rows: Tensor | None


class Modulation(nn.Sequential):
    """SiLU and a linear layer: condition [classes, positions, width] to ``parts`` tensors of that shape."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition: Condition) -> tuple[Tensor, ...]:
        out = super().forward(condition.values)
        if condition.rows is not None:
            out = out.index_select(0, condition.rows)
        return out.chunk(self.parts, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest to each row: float [n, Z] and [codes, Z] -> int64 [n]; ties: the smallest index."""
    squares = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
    return torch.addmm(squares, rows, codes.t(), alpha=-2.0).argmin(1)
