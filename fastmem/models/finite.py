"""Whether the numbers of a pass can be trusted: neither infinite nor NaN, nor so large that a norm hides them.

A number that is not finite stays in the residual stream to its end, because every block adds to the stream. So one look
at the last stream tells of every position of every block. One look costs a pass over a tensor and, on a GPU, one wait
for its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# beyond it the squares of a few thousand channels overflow float32, and a norm turns all of them into zeros
LARGEST = 2.0**56


@dataclass(frozen=True)
class Witness:
    """Collects the extremes of tensors on their device, so that the answer for all of them takes one wait."""

    extremes: list[Tensor] = field(default_factory=list)

    def see(self, *tensors: Tensor) -> Witness:
        """Take in tensors of any shape and floating type, all on one device; returns itself."""
        self.extremes.extend(torch.stack(tensor.aminmax()).float() for tensor in tensors if tensor.numel())
        return self

    def holds(self) -> bool:
        """Whether no number of the tensors was NaN or larger than 2^56."""
        # NaN is not smaller than anything
        return not self.extremes or bool((torch.stack(self.extremes).abs() <= LARGEST).all())


def expose(x: Tensor) -> Tensor:
    """The same numbers, with NaN in place of those that a norm would hide, so that what follows is NaN as well."""
    return x.masked_fill(x.abs() > LARGEST, torch.nan)


def first_part(networks: Iterable[nn.Module], run: Callable[[], object]) -> str:
    """Name of the first module of some networks that gives a wrong number while ``run()`` runs; "" where none does.

    It looks at the output of every module, which is slow, so it is for what is known to have gone wrong.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, Any], None]:
        def hook(module: nn.Module, given: object, output: Any) -> None:
            numbers = isinstance(output, Tensor) and output.is_floating_point()
            if numbers and not found and not Witness().see(output).holds():
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for network in networks
        for name, module in network.named_modules()
        if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def first_wrong(responses: Tensor) -> tuple[int, int, int, float] | None:
    """Block, segment, unit and value of the first wrong response, block by block; None where all are right.

    ``responses`` are float32 [N,layers,segments,units].
    """
    by_block = responses.movedim(0, -1)
    wrong = (~(by_block.abs() <= LARGEST)).nonzero()
    if not len(wrong):
        return None
    block, segment, unit, _ = place = tuple(wrong[0].tolist())
    return block, segment, unit, float(by_block[place])
