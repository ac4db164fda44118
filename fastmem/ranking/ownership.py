"""Which images own the selected units, and which share of the units belongs to each group of images.

The owner of a unit is the image to which the unit responded most strongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.ranking.selection import SCORES, Selection, highest, matched_to, ranked_segments
from fastmem.stats import UnitStats

# bootstrap samples, and random groups, from which intervals are computed
RESAMPLES = 2000


def owners(stats: UnitStats, selection: Selection, heldout: UnitStats | None = None) -> Tensor:
    """Return the id of the training image that owns each selected unit, int64 [n]; -1 where a unit never responded.

    The owner is the image with the largest response in the segment in which the unit's score is highest. For units
    selected by within-class UnitMem, it is the image whose response gave that score. For units selected by gap, which
    needs ``heldout``, only training images that are matched to held-out images are considered.

    Raises: UsageError where the selection needs held-out statistics that match the training images, or statistics of
    every class, and there are none.
    """
    by = selection.by if selection.by in SCORES else "unitmem"
    source = matched_to(stats, heldout) if by == "gap" else stats
    images = source.within_class_image() if by == "within-class" else source.top_image[..., 0]
    segments = ranked_segments(stats)
    best = SCORES[by](stats, heldout)[:, segments].argmax(1)
    return images[:, segments].gather(1, best[:, None])[:, 0][selection.layer, selection.unit]


def owned_units(image_ids: np.ndarray, owner_ids: Tensor) -> np.ndarray:
    """Return how many units each image owns, int64 [N], from the ids of all images and of the units' owners."""
    ids, counts = np.unique(owner_ids.numpy(), return_counts=True)
    known = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return np.array([known.get(i, 0) for i in image_ids.tolist()], dtype=np.int64)


@dataclass(frozen=True)
class GroupShare:
    """The share of the selected units that the images of one group own.

    The ends of both intervals are NaN, undefined, where there is one image only.

    Attributes:
        group: name of the group.
        images: number of images in the group.
        owning: number of images in the group that own at least one unit.
        share: units owned by the group, as a share of all owned units, in [0,1].
        low: lower end of the 95 % interval of ``share``, by bootstrap over images.
        high: upper end of the 95 % interval of ``share``.
        chance: images in the group, as a share of all images, in [0,1].
        chance_low: lower end of the range that holds 95 % of the shares of random groups of that size.
        chance_high: upper end of that range.
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
    """Return the share of each group of images in the owned units, in the order in which the groups first appear.

    ``owned`` is the number of units that each image owns, int64 [N], and ``groups`` the name of each image's group. One
    image can own many units, so the bootstrap draws images, not units. For the range by chance, the images are assigned
    to the groups at random. ``seed`` makes the draws repeatable.

    Raises: UsageError where the lengths differ or no unit is owned.
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
    if len(owned) < 2:
        # every draw from one image is that image
        resampled, dealt = np.full((2, 1, len(names)), np.nan)
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
    """Return how many units the images of both sets own, when UnitMem is computed over both sets together.

    The units are those of highest UnitMem. Both sets have equal size, so by chance held-out images own half of the
    units; a tie counts for both sides. The results are int64 [N] for training images and int64 [M] for held-out ones.

    Args:
        stats: statistics of the training images; only the part that is matched to the held-out images is used.
        heldout: statistics of the held-out images.
        image_ids: int64 [N], ids of the training images; those outside the matched part own nothing.
        heldout_ids: int64 [M], ids of the held-out images.
        fraction: share of all units that are taken, in (0,1].

    Raises: UsageError where the sets do not match in size and classes.
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
