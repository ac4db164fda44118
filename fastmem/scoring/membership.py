"""Membership inference: does a lower loss tell training images from held-out ones?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastmem.errors import UsageError

RESAMPLES = 1000
FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Membership:
    """How well a score tells members from non-members, with 95 % bootstrap intervals over images.

    auc: chance that a member scores higher than a non-member, ties counted half; tpr: share of the members that score
    above all but 1 % of the non-members (true positives at 1 % false positives).
    """

    members: int
    nonmembers: int
    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float

    def document(self) -> dict[str, Any]:
        """The numbers for a JSON document."""
        return {key: round(v, 6) if isinstance(v, float) else v for key, v in asdict(self).items()}

    def __str__(self) -> str:
        return (
            f"AUC {self.auc:.3f} ({self.auc_low:.3f} to {self.auc_high:.3f}), {self.tpr:.1%} found at 1 % false alarms "
            f"({self.tpr_low:.1%} to {self.tpr_high:.1%}), {self.members:,} members against {self.nonmembers:,}"
        )


def membership(members: np.ndarray, nonmembers: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Membership:
    """Tell members from non-members by a score, float [N] and [M], that is higher for members (minus the loss).

    NaN stands for an image that could not be read and is left out. At 1 % false positives at most floor(0.01 M)
    non-members may score above the threshold, so a small set of them makes a coarse one.

    Raises: UsageError where a side is empty.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (members, nonmembers)]
    sides = [side[~np.isnan(side)] for side in sides]
    if not all(map(len, sides)):
        raise UsageError(f"expected members and non-members, got {len(sides[0])} and {len(sides[1])} scores")
    # every resample is a set of counts over the same distinct values, so nothing is sorted twice
    values = np.unique(np.concatenate(sides))
    where = [np.searchsorted(values, side) for side in sides]
    whole = [np.bincount(at, minlength=len(values)) for at in where]
    auc, tpr = _rates(*whole)
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [
            _rates(*(np.bincount(at[generator.integers(0, len(at), len(at))], minlength=len(values)) for at in where))
            for _ in range(resamples)
        ]
    )
    (auc_low, tpr_low), (auc_high, tpr_high) = np.percentile(drawn, [2.5, 97.5], axis=0)
    sizes = [len(side) for side in sides]
    return Membership(*sizes, auc, float(auc_low), float(auc_high), tpr, float(tpr_low), float(tpr_high))


def _rates(members: np.ndarray, nonmembers: np.ndarray) -> tuple[float, float]:
    """AUC and true-positive rate from how often each value, in ascending order, occurs on both sides."""
    n, m = members.sum(), nonmembers.sum()
    below = np.cumsum(nonmembers) - nonmembers
    auc = (members * (below + 0.5 * nonmembers)).sum() / (n * m)
    # a threshold at value i lets through what lies above it
    above = m - np.cumsum(nonmembers)
    threshold = int(np.argmax(above <= np.floor(FALSE_POSITIVES * m)))
    return float(auc), float(members[threshold + 1 :].sum() / n)
