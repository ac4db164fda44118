"""Membership inference: measure how well a score, such as the loss, separates training images from held-out ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastmem.errors import UsageError
from fastmem.scoring.image_losses import ImageLosses

# bootstrap samples from which the intervals are computed
RESAMPLES = 1000
# share of the non-members that may be taken for members
FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Membership:
    """How well a score separates members (training images) from non-members, with 95 % bootstrap intervals over images.

    The intervals are NaN, undefined, where there are fewer than two members or two non-members.

    Attributes:
        members: number of members.
        nonmembers: number of non-members.
        auc: probability that a member has a higher score than a non-member, with ties counted half, in [0,1].
        auc_low: lower end of the 95 % interval of ``auc``.
        auc_high: upper end of the 95 % interval of ``auc``.
        tpr: share of the members found when 1 % of the non-members are taken for members, in [0,1].
        tpr_low: lower end of the 95 % interval of ``tpr``.
        tpr_high: upper end of the 95 % interval of ``tpr``.
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
        """Return the numbers, rounded to six decimals, for a JSON document; what is undefined becomes null there."""
        return {key: round(v, 6) if isinstance(v, float) else v for key, v in asdict(self).items()}

    def __str__(self) -> str:
        auc, tpr = (
            interval_text(low, high, spec)
            for low, high, spec in ((self.auc_low, self.auc_high, ".3f"), (self.tpr_low, self.tpr_high, ".1%"))
        )
        return (
            f"AUC {self.auc:.3f} ({auc}), {self.tpr:.1%} found at 1 % false alarms ({tpr}), "
            f"{self.members:,} members against {self.nonmembers:,}"
        )


def interval_text(low: float, high: float, spec: str) -> str:
    """Return the text of an interval whose ends are written by ``spec``, or of one that is undefined."""
    return "interval undefined" if math.isnan(low) else f"{low:{spec}} to {high:{spec}}"


def loss_scores(train: ImageLosses, heldout: ImageLosses) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the scores that losses give to training images and to held-out images, float32 [N] and [M], by name.

    The score "loss" is minus the loss, so that it is higher for an image that the model knows. The score "guided",
    where the loss without a class is known for both sets, is that loss minus the loss with the class.
    """
    scores = {"loss": (-train.loss, -heldout.loss)}
    if train.guided is not None and heldout.guided is not None:
        scores["guided"] = (train.guided, heldout.guided)
    return scores


def membership(members: np.ndarray, nonmembers: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Membership:
    """Measure how well a score separates members from non-members.

    At 1 % false positives at most floor(0.01 M) of M non-members may have a score above the threshold, so the result is
    coarse for few non-members.

    Args:
        members: float [N], scores that are higher the more likely an image is a member, such as minus its loss. NaN
            stands for an image that could not be read, and is left out.
        nonmembers: float [M], the scores of the non-members.
        seed: seed of the bootstrap.
        resamples: number of bootstrap samples.

    Raises: UsageError where there are no members or no non-members.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (members, nonmembers)]
    sides = [side[~np.isnan(side)] for side in sides]
    if not all(map(len, sides)):
        raise UsageError(f"expected members and non-members, got {len(sides[0])} and {len(sides[1])} scores")
    # a bootstrap sample is a count for each distinct score, so the scores are sorted only once
    values = np.unique(np.concatenate(sides))
    where = [np.searchsorted(values, side) for side in sides]
    whole = [np.bincount(at, minlength=len(values)) for at in where]
    auc, tpr = _rates(*whole)
    n, m = map(len, sides)
    if min(n, m) < 2:
        # every bootstrap sample of one image is that image
        return Membership(n, m, auc, math.nan, math.nan, tpr, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [
            _rates(*(np.bincount(at[generator.integers(0, len(at), len(at))], minlength=len(values)) for at in where))
            for _ in range(resamples)
        ]
    )
    (auc_low, tpr_low), (auc_high, tpr_high) = np.percentile(drawn, [2.5, 97.5], axis=0)
    return Membership(n, m, auc, float(auc_low), float(auc_high), tpr, float(tpr_low), float(tpr_high))


def _rates(members: np.ndarray, nonmembers: np.ndarray) -> tuple[float, float]:
    """Return AUC and true-positive rate from how often each distinct score, ascending, occurs on either side."""
    n, m = members.sum(), nonmembers.sum()
    below = np.cumsum(nonmembers) - nonmembers
    auc = (members * (below + 0.5 * nonmembers)).sum() / (n * m)
    # at a threshold of score i, the images with higher scores are taken for members
    above = m - np.cumsum(nonmembers)
    threshold = int(np.argmax(above <= np.floor(FALSE_POSITIVES * m)))
    return float(auc), float(members[threshold + 1 :].sum() / n)
