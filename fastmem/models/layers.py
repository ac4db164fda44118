"""Parts that the generators share: adaLN conditions, the MLP whose units are scored, the cache, the nearest code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# the label of the unconditional branch, in every family
NO_CLASS = -1
# how many positions' modulations are computed ahead, and how many numbers they may be (256 MiB in float32)
MOST_AHEAD, NUMBERS_AHEAD = 64, 2**26


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
    rows: int64 [N], the row of each image, or None where one row serves all images; ready: what modulations make of the
    values, where that was computed ahead.
    """

    values: Tensor
    rows: Tensor | None
    ready: Mapping[Modulation, Tensor] | None = None


class Modulation(nn.Sequential):
    """SiLU and a linear layer: condition [classes, positions, width] to ``parts`` tensors of that shape."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def project(self, values: Tensor) -> Tensor:
        """[classes, positions, width] -> [classes, positions, parts * width]."""
        return super().forward(values)

    def forward(self, condition: Condition) -> tuple[Tensor, ...]:
        out = self.project(condition.values) if condition.ready is None else condition.ready[self]
        if condition.rows is not None:
            out = out.index_select(0, condition.rows)
        return out.chunk(self.parts, dim=-1)


class ConditionsAhead:
    """Conditions of single positions whose modulations are computed for many positions at a time.

    A step of generation with few rows takes the time that reading the weights takes, of which the modulations are a
    third; this reads them once for up to 64 steps.

    modulations: all that will be asked; make: the condition of the positions first..stop-1; positions: of a sequence.
    """

    def __init__(
        self, modulations: Sequence[Modulation], make: Callable[[int, int], Condition], positions: int
    ) -> None:
        self.modulations, self.make, self.positions = tuple(modulations), make, positions
        self.first = self.stop = 0

    def at(self, position: int) -> Condition:
        """The condition of one position; they are asked for in rising order."""
        if not self.first <= position < self.stop:
            self._compute(position)
        here = slice(position - self.first, position - self.first + 1)
        ready = {modulation: out[:, here] for modulation, out in self.ready.items()}
        return Condition(self.values[:, here], self.rows, ready)

    def _compute(self, first: int) -> None:
        one = self.make(first, first + 1)
        numbers = one.values.numel() * sum(modulation.parts for modulation in self.modulations)
        steps = max(1, min(MOST_AHEAD, NUMBERS_AHEAD // numbers))
        self.first, self.stop = first, min(first + steps, self.positions)
        condition = self.make(self.first, self.stop)
        self.values, self.rows = condition.values, condition.rows
        self.ready = {modulation: modulation.project(condition.values) for modulation in self.modulations}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def nearest_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest to each row: float [n, Z] and [codes, Z] -> int64 [n]; ties: the smallest index."""
    squares = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
    return torch.addmm(squares, rows, codes.t(), alpha=-2.0).argmin(1)
