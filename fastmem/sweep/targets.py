"""Which targets a table counts, and which of them its comparisons are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastmem.sweep.table import Measured


@dataclass(frozen=True, eq=False)
class TargetSet:
    """The targets of a table.

    classes: int64 [N]; reported: bool [N], those that no units were chosen by; prefixes: in tokens, the last is the one
    that is compared; threshold: similarity above which a target counts as extracted; groups: masks bool [N] by name
    that are counted beside the whole.
    """

    classes: np.ndarray
    reported: np.ndarray
    prefixes: tuple[int, ...]
    threshold: float
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)

    def extracted(self, measured: Measured) -> np.ndarray:
        """Which targets a row's model gives away, bool [P,N]."""
        return measured.similarity > self.threshold
