"""A kernel launch as a value, which can be run, or only compiled for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with everything that it is launched with.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: number of programs along each axis.
        arguments: tensors and numbers, in the kernel's order.
        constants: the kernel's constexpr parameters, ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]

    def run(self) -> None:
        """Launch on the current stream; an empty grid launches nothing."""
        if all(self.grid):
            self.kernel[self.grid](*self.arguments, **self.constants)

    def compile(self) -> Any:
        """Compile for the active driver's target without running; returns Triton's compiled kernel."""
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.constants)
