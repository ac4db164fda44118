"""Select units by a score, or draw units as a control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.stats import UnitStats

# reports select this share of the units, by each of these scores
FRACTION = 0.05
RANKINGS = ("unitmem", "within-class", "gap")
SCOPES = ("global", "per-layer")
MERGES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda scores: scores.amax(1),
    "mean": lambda scores: scores.mean(1),
    "sum": lambda scores: scores.sum(1),
}
# largest relative difference between the mean responses of a unit and the unit matched to it
TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Selection:
    """Selected units, best first, and how they were selected.

    Attributes:
        layer: int64 [n], layer of each unit, from 0.
        unit: int64 [n], position of each unit in its layer, from 0.
        score: float64 [n], the score that each unit was selected by; UnitMem for random and matched units.
        by: name of the score, or "random", "lowest", "matched" or "scores".
        fraction: share of all units that were to be selected, in (0,1].
        scope: "global", or "per-layer" for equally many units in every layer.
        merge: how a unit's scores in all segments became one, "max", "mean" or "sum".
        seed: seed of random and matched units.
        unmatched: number of units in a matched selection for which no unit of the layer had a mean response within 5 %,
            so that the nearest one was taken.
    """

    layer: Tensor
    unit: Tensor
    score: Tensor
    by: str
    fraction: float
    scope: str = "global"
    merge: str = "max"
    seed: int = 0
    unmatched: int = field(default=0)

    def __len__(self) -> int:
        return len(self.layer)

    def mask(self, layers: int, units: int) -> Tensor:
        """Return a mask, bool [layers, units], that is True for the selected units."""
        mask = torch.zeros(layers, units, dtype=torch.bool)
        mask[self.layer, self.unit] = True
        return mask


def ranked_segments(stats: UnitStats) -> list[int]:
    """Return the positions of the segments that are ranked: all except those that depend on the class alone."""
    return [i for i, name in enumerate(stats.segments) if name not in stats.class_only]


def merge_segments(stats: UnitStats, scores: Tensor, merge: str = "max") -> Tensor:
    """Merge the scores of each unit, float64 [layers,segments,units], over segments to float64 [layers,units].

    Segments that depend on the class alone are left out. ``merge`` is "max", "mean" or "sum".

    Raises: UsageError where ``merge`` is another word, or where every segment depends on the class alone.
    """
    if merge not in MERGES:
        raise UsageError(f"expected merge as one of {', '.join(MERGES)}, got {merge!r}")
    segments = ranked_segments(stats)
    if not segments:
        raise UsageError(
            f"expected a segment that sees image tokens, got only {', '.join(stats.segments)}: score another one too"
        )
    return MERGES[merge](scores[:, segments])


def gap_scores(stats: UnitStats, heldout: UnitStats | None) -> Tensor:
    """Return UnitMem on training images minus UnitMem on held-out images, float64 [layers,segments,units] in [-1,1].

    Of the training images only a set of the same size and classes as the held-out images is used.

    Raises: UsageError where there are no held-out statistics, or no such set.
    """
    train = matched_to(stats, heldout)
    return train.unitmem() - required(heldout).unitmem()


def required(heldout: UnitStats | None) -> UnitStats:
    """Return the held-out statistics. Raises: UsageError where there are none."""
    if heldout is None:
        raise UsageError("expected held-out statistics with by='gap', got none: score with --heldout, pass heldout=")
    return heldout


def matched_to(stats: UnitStats, heldout: UnitStats | None) -> UnitStats:
    """Return the training statistics, of all images or of a part, that match a held-out set in size and classes.

    UnitMem grows with the number of images, so only sets of equal size can be compared. Up to 2 % of the images, or one
    image, may differ.

    Raises: UsageError where there are no held-out statistics, or no training statistics that match them.
    """
    heldout = required(heldout)
    if heldout.count < 2:
        raise UsageError(f"expected at least two held-out images for UnitMem, got {heldout.count}: score more of them")
    if heldout.segments != stats.segments or heldout.shape != stats.shape:
        raise UsageError(
            f"expected held-out statistics of the same units and segments, got shape {heldout.shape} with segments "
            f"{', '.join(heldout.segments)} against {stats.shape} with {', '.join(stats.segments)}"
        )
    found = find_matched(stats, heldout)
    if found is not None:
        return found
    raise UsageError(
        f"expected training and held-out statistics of equal size and classes, got {stats.count:,} and "
        f"{heldout.count:,} images: score both in one pass, which keeps a matched part"
    )


def find_matched(stats: UnitStats, heldout: UnitStats) -> UnitStats | None:
    """Return the training statistics, of all images or of a part, that match a held-out set in size and classes.

    Return None where neither all training images nor ``stats.matched`` match it to within 2 % or one image, or where
    there are fewer than two images, of which UnitMem is not defined.
    """
    if heldout.count < 2:
        return None
    allowed = max(1, 0.02 * heldout.count)
    return next(
        (s for s in (stats, stats.matched) if s is not None and s.count > 1 and _differ(s, heldout) <= allowed), None
    )


def _differ(stats: UnitStats, heldout: UnitStats) -> int:
    labels = stats.class_counts.keys() | heldout.class_counts.keys()
    return sum(abs(stats.class_counts.get(c, 0) - heldout.class_counts.get(c, 0)) for c in labels)


def possible_rankings(stats: UnitStats, heldout: UnitStats | None) -> list[str]:
    """Return those of ``RANKINGS`` for which the statistics have what they need.

    Args:
        stats: statistics of the training images.
        heldout: statistics of the held-out images; None leaves out the ranking by gap.
    """
    # a run merged from parts may lack the statistics by class, and a summary of them
    missing = set(stats.undefined)
    if stats.known_summary is None and stats.rows is None:
        missing.add("within-class")
    if "unitmem" in missing or heldout is None or find_matched(stats, heldout) is None:
        missing.add("gap")
    return [by for by in RANKINGS if by not in missing]


# functions that score every unit and segment, by name; "lowest" selects the lowest UnitMem instead of the highest
SCORES: dict[str, Callable[[UnitStats, UnitStats | None], Tensor]] = {
    "unitmem": lambda stats, heldout: stats.unitmem(),
    "gap": gap_scores,
    "within-class": lambda stats, heldout: stats.within_class_unitmem(),
    "class-selectivity": lambda stats, heldout: stats.class_selectivity(),
    "mean": lambda stats, heldout: stats.mean,
    "variance": lambda stats, heldout: stats.var,
    "lowest": lambda stats, heldout: stats.unitmem(),
}
CONTROLS = ("random", "lowest", "matched")
SELECTIONS = (*(by for by in SCORES if by not in CONTROLS), *CONTROLS, "scores")


def select(
    stats: UnitStats,
    fraction: float = 0.05,
    by: str = "unitmem",
    scope: str = "global",
    merge: str = "max",
    seed: int = 0,
    heldout: UnitStats | None = None,
    matched_with: Selection | None = None,
    scores: Tensor | None = None,
) -> Selection:
    """Select n = max(1, round(fraction * layers * units)) units by a score, or draw them as a control.

    Units of highest score come first, and of equal scores the one of the lower layer, then of the lower position.

    Args:
        stats: statistics of the training images.
        fraction: share of all units to select, in (0,1].
        by: a score: "unitmem", "gap" (needs ``heldout``), "within-class", "class-selectivity", "mean", "variance", or
            "scores" for those in ``scores``; or a control: "lowest" (lowest UnitMem), "random", or "matched" (for every
            unit of ``matched_with`` another unit of the same layer whose mean response is within 5 %).
        scope: "global", or "per-layer" for the same number of units in every layer, to within one.
        merge: how a unit's scores in all segments become one, "max", "mean" or "sum".
        seed: seed of random and matched units.
        heldout: statistics of held-out images.
        matched_with: the selection to match; None for the selection by UnitMem.
        scores: float [layers, units], your own scores.

    Raises: UsageError for an unknown word, a fraction outside (0,1], held-out statistics that are missing or do not
    match, scores of another shape, or a matched selection where a layer has too few other units.
    """
    if by not in SELECTIONS:
        raise UsageError(f"expected a selection by one of {', '.join(SELECTIONS)}, got {by!r}")
    if scope not in SCOPES:
        raise UsageError(f"expected scope global or per-layer, got {scope!r}")
    if not 0 < fraction <= 1:
        raise UsageError(f"expected a fraction of the units above 0 and up to 1, got {fraction}")
    if matched_with is not None and by != "matched":
        raise UsageError(f"expected matched_with with by='matched' only, got it with by={by!r}")
    if (by == "scores") != (scores is not None):
        raise UsageError("expected scores together with by='scores', got one without the other")
    if by == "matched":
        target = matched_with or select(stats, fraction, "unitmem", scope, merge)
        return _matched(stats, target, merge, seed)
    if scores is not None:
        chosen_by = order_by = _own_scores(stats, scores)
    elif by == "random":
        chosen_by = merge_segments(stats, stats.unitmem(), merge)
        generator = torch.Generator().manual_seed(seed)
        order_by = torch.rand(chosen_by.shape, generator=generator, dtype=torch.float64)
    else:
        chosen_by = merge_segments(stats, SCORES[by](stats, heldout), merge)
        order_by = -chosen_by if by == "lowest" else chosen_by
    layer, unit = highest(order_by, fraction, scope)
    return Selection(layer, unit, chosen_by[layer, unit], by, fraction, scope, merge, seed)


def _own_scores(stats: UnitStats, scores: Tensor) -> Tensor:
    expected = (stats.shape[0], stats.shape[2])
    if tuple(scores.shape) != expected or not scores.isfinite().all():
        raise UsageError(
            f"expected finite scores [layers, units] of shape {list(expected)}, got {list(scores.shape)}: give one "
            "number for every unit"
        )
    return scores.double()


def highest(scores: Tensor, fraction: float, scope: str) -> tuple[Tensor, Tensor]:
    """Return the layers and the positions, int64 [n] each, of the units with the highest scores [layers, units].

    The best unit comes first; of equal scores, the one of the lower layer and position. ``fraction`` is the share of
    units to return, and ``scope`` is "global", or "per-layer" for equally many units in every layer.
    """
    layers, units = scores.shape
    total = max(1, round(fraction * layers * units))
    if scope == "global":
        chosen = scores.flatten().argsort(descending=True, stable=True)[:total]
    else:
        # the same number of units in every layer; the first layers take one more where it does not divide evenly
        best = scores.argsort(dim=1, descending=True, stable=True)
        quota = [total // layers + (i < total % layers) for i in range(layers)]
        kept = torch.cat([i * units + best[i, :n] for i, n in enumerate(quota)]).sort().values
        chosen = kept[scores.flatten()[kept].argsort(descending=True, stable=True)]
    return chosen // units, chosen % units


def _matched(stats: UnitStats, target: Selection, merge: str, seed: int) -> Selection:
    """Draw for every unit of ``target`` another one of the same layer whose mean response is within 5 %."""
    means = merge_segments(stats, stats.mean, merge)
    unitmem = merge_segments(stats, stats.unitmem(), merge)
    layers, units = means.shape
    generator = torch.Generator().manual_seed(seed)
    taken = target.mask(layers, units)
    crowded = taken.sum(1) > units // 2
    if crowded.any():
        first = int(crowded.nonzero()[0])
        raise UsageError(
            f"expected at most half of a layer's units to match, got {int(taken[first].sum())} of {units} in layer "
            f"{first}: select a smaller fraction"
        )
    partner = torch.empty(len(target), dtype=torch.int64)
    unmatched = 0
    # relative distance of every target to every unit of its layer
    own = means[target.layer, target.unit]
    distance = (means[target.layer] - own[:, None]).abs() / own[:, None].clamp_min(torch.finfo(torch.float64).tiny)
    distance[taken[target.layer]] = torch.inf
    free_partners = (distance <= TOLERANCE).sum(1)
    # units with the fewest possible partners choose first; where none is left, the nearest unit is taken
    for i in free_partners.argsort(stable=True).tolist():
        layer = target.layer[i]
        apart = torch.where(taken[layer], torch.inf, distance[i])
        within = (apart <= TOLERANCE).nonzero()[:, 0]
        if len(within):
            unit = within[int(torch.randint(len(within), (1,), generator=generator))]
        else:
            unit = apart.argmin()
            unmatched += 1
        partner[i] = unit
        taken[layer, unit] = True
    score = unitmem[target.layer, partner]
    return Selection(
        target.layer, partner, score, "matched", target.fraction, target.scope, target.merge, seed, unmatched
    )
