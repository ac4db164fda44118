"""Parts that the generators share: the cache, the MLP whose units are scored, and the modulation by a condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmem.backends.plain import Span
from fastmem.backends.select import FC1Response

# the label of the unconditional branch, in every family
NO_CLASS = -1
# most positions whose modulations are computed ahead, and the most numbers these may hold (256 MiB in float32)
MOST_AHEAD, NUMBERS_AHEAD = 64, 2**26

AnyBlock = TypeVar("AnyBlock", bound=nn.Module)


class Blocks(nn.ModuleList, Generic[AnyBlock]):
    """The blocks of a network, in order, as a list of modules of one type."""

    def __init__(self, blocks: Iterable[AnyBlock]) -> None:
        super().__init__(blocks)

    def __iter__(self) -> Iterator[AnyBlock]:
        # torch's list does not know of what type its modules are
        return cast("Iterator[AnyBlock]", super().__iter__())


class Cache:
    """Keys and values of every layer, allocated once: two tensors [layers, N, heads, positions, head width].

    Args:
        layers: number of blocks.
        rows: number of sequences N.
        heads: attention heads of a block.
        positions: most positions that a sequence can have.
        head_width: channels of a head.
        like: a tensor with the wanted dtype and device.
    """

    def __init__(self, layers: int, rows: int, heads: int, positions: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_empty(layers, rows, heads, positions, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values [N, heads, n, head width] from position ``length`` on; returns all so far.

        The caller raises ``length`` when every layer has appended its own.
        """
        stop = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : stop] = keys
        self.values[layer, :, :, self.length : stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class MLP(nn.Module):
    """Two linear layers with a GELU between them; the outputs of the first, fc1, are the units that fastmem scores.

    ``gelu`` is "none" for the exact function or "tanh" for its approximation, as torch names them.
    """

    def __init__(self, width: int, units: int, gelu: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, units)
        self.fc2 = nn.Linear(units, width)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate=self.gelu))

    def observe(self, x: Tensor, spans: Sequence[Span], fc1_response: FC1Response) -> tuple[Tensor, Tensor]:
        """The output [N, n, width], and each unit's mean absolute activation over each span, float32 [N, S, units]."""
        hidden, response = fc1_response(x, self.fc1.weight, self.fc1.bias, spans, self.gelu)
        return self.fc2(hidden), response

    def respond(self, x: Tensor, spans: Sequence[Span], fc1_response: FC1Response) -> Tensor:
        """The mean absolute activations of ``observe`` alone, computed at no position outside the spans' range."""
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        shifted = [(start - first, stop - first) for start, stop in spans]
        needed = x[:, first:last]
        return fc1_response(needed, self.fc1.weight, self.fc1.bias, shifted, self.gelu, keep_hidden=False)[1]


@dataclass(frozen=True)
class Condition:
    """What the modulations of a pass depend on, with one row for each distinct class.

    Images of one class share their row, so that nothing is computed twice.

    Attributes:
        values: [classes, positions, width], or [classes, 1, width] where all positions share a value.
        rows: int64 [N], the row of each image, or None where one row serves all images.
        ready: the modulations' outputs for the values where they were computed ahead, or None.
    """

    values: Tensor
    rows: Tensor | None
    ready: Mapping[Modulation, Tensor] | None = None


class Modulation(nn.Sequential):
    """SiLU and a linear layer that turn a condition into ``parts`` tensors for the images, such as shift and scale."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    @property
    def weight(self) -> Tensor:
        """The linear layer's weight, [parts * width, width]."""
        return self.get_parameter("1.weight")

    def project(self, values: Tensor) -> Tensor:
        """Values [classes, positions, width] to all parts side by side, [classes, positions, parts * width]."""
        return super().forward(values)

    def forward(self, condition: Condition) -> tuple[Tensor, ...]:
        """The parts, each [N, positions, width], or [1, positions, width] where one row serves all images."""
        out = self.project(condition.values) if condition.ready is None else condition.ready[self]
        if condition.rows is not None:
            out = out.index_select(0, condition.rows)
        return out.chunk(self.parts, dim=-1)


class ConditionsAhead:
    """Conditions of single positions whose modulations are computed for many positions at a time.

    A step of generation with few rows takes as long as reading the weights, and a third of the weights belong to the
    modulations. They are read once for up to 64 steps here.

    Args:
        modulations: every modulation of the network.
        make: gives the condition of the positions first..stop-1.
        positions: positions of a sequence.
    """

    def __init__(
        self, modulations: Sequence[Modulation], make: Callable[[int, int], Condition], positions: int
    ) -> None:
        self.modulations, self.make, self.positions = tuple(modulations), make, positions
        self.first = self.stop = 0

    def at(self, position: int) -> Condition:
        """The condition of one position. Positions must be asked for in rising order."""
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
    """``x * (1 + scale) + shift``."""
    return torch.addcmul(shift, x, 1 + scale)
