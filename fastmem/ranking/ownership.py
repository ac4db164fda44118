"""Which images own the selected units: the image with the largest response, and what groups of images own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.ranking.selection import SCORES, Selection, highest, matched_to, ranked_segments
from fastmem.stats import UnitStats

RESAMPLES = 2000


def owners(stats: UnitStats, selection: Selection, heldout: UnitStats | None = None) -> Tensor:
    """Id of the training image that owns each selected unit, int64 [n]; -1 where a unit never responded.

    That is the image with the largest response in the segment in which the unit's score is highest; for a selection by
    within-class UnitMem the image to which that score belongs, for one by gap the image of the matched training set.

    Raises: as ``select``.
    """
    by = selection.by if selection.by in SCORES else "unitmem"
    source = matched_to(stats, heldout) if by == "gap" else stats
    images = source.within_class_image() if by == "within-class" else source.top_image[..., 0]
    segments = ranked_segments(stats)
    best = SCORES[by](stats, heldout)[:, segments].argmax(1)
    return images[:, segments].gather(1, best[:, None])[:, 0][selection.layer, selection.unit]


def owned_units(image_ids: np.ndarray, owner_ids: Tensor) -> np.ndarray:
    """How many of the selected units each image owns: int64 [N] for ids int64 [N]."""
    ids, counts = np.unique(owner_ids.numpy(), return_counts=True)
    known = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return np.array([known.get(i, 0) for i in image_ids.tolist()], dtype=np.int64)


@dataclass(frozen=True)
class GroupShare:
    """What a group of images owns of the selected units, as shares of all owned ones.

    images: of the group; owning: those that own at least one unit; share with its 95 % bootstrap interval over images;
    chance: the group's share of the images, with the 95 % range of shares of random groups of that size.
    """

    group: str
    images: int
    owning: int
    share: float
    low: float
    high: float
    chance: float
    chance_low: float
    chance_high: float


def group_shares(owned: np.ndarray, groups: Sequence[str], seed: int = 0) -> list[GroupShare]:
    """Shares of each group of images in the units owned, in the order in which groups first appear.

    owned: units owned by each image, int [N]; groups: the group of each image. One image can own many units, so the
    bootstrap resamples images, not units, and the chance range deals the groups anew to the images.

    Raises: UsageError where lengths differ or no unit is owned.
    """
    if len(owned) != len(groups) or not owned.sum():
        raise UsageError(
            f"expected units owned and a group for each image, got {len(owned)} and {len(groups)} with "
            f"{int(owned.sum())} units owned"
        )
    names = list(dict.fromkeys(groups))
    code = np.array([names.index(g) for g in groups])
    member = code[None] == np.arange(len(names))[:, None]
    generator = np.random.default_rng(seed)
    resampled, dealt = np.empty((2, RESAMPLES, len(names)))
    for i in range(RESAMPLES):
        weight = np.bincount(generator.integers(0, len(owned), len(owned)), minlength=len(owned)) * owned
        resampled[i] = (member @ weight) / max(1, weight.sum())
        dealt[i] = member @ generator.permutation(owned) / owned.sum()
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    chance_low, chance_high = np.percentile(dealt, [2.5, 97.5], axis=0)
    return [
        GroupShare(
            name,
            int(member[g].sum()),
            int((owned[member[g]] > 0).sum()),
            float(owned[member[g]].sum() / owned.sum()),
            float(low[g]),
            float(high[g]),
            float(member[g].mean()),
            float(chance_low[g]),
            float(chance_high[g]),
        )
        for g, name in enumerate(names)
    ]


def pooled_owned(
    stats: UnitStats, heldout: UnitStats, image_ids: np.ndarray, heldout_ids: np.ndarray, fraction: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Units owned by each image, int64 [N] and [M], of the top units by UnitMem over both matched sets together.

    image_ids, heldout_ids: of the images of ``stats`` and ``heldout``; those outside the matched part own nothing. By
    chance held-out images own half of the units, since the sets are of equal size; a tie counts for both sides.

    Raises: as ``select``; UsageError where the sets do not match.
    """
    train = matched_to(stats, heldout)
    segments = ranked_segments(train)
    score, best = train.merge(heldout).unitmem()[:, segments].max(1)
    layer, unit = highest(score, fraction, "global")
    segment = torch.tensor(segments)[best[layer, unit]]
    values, images = zip(
        *((s.top_value[layer, segment, unit, 0], s.top_image[layer, segment, unit, 0]) for s in (train, heldout)),
        strict=True,
    )
    mine, theirs = images[0][values[0] >= values[1]], images[1][values[1] >= values[0]]
    return owned_units(image_ids, mine), owned_units(heldout_ids, theirs)
