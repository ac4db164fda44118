"""Which units to act on: ranked by a score, or drawn as a control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.stats import UnitStats

# the share of units that reports speak of, and the rankings that they compare
FRACTION = 0.05
RANKINGS = ("unitmem", "within-class", "gap")
SCOPES = ("global", "per-layer")
MERGES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda scores: scores.amax(1),
    "mean": lambda scores: scores.mean(1),
    "sum": lambda scores: scores.sum(1),
}
# how far the mean response of a matched unit may be from its counterpart's
TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen units, best first.

    layer, unit: int64 [n]; score: float64 [n], what they were chosen by (UnitMem for random and matched units); by,
    fraction, scope, merge, seed: how they were chosen; unmatched: units for which no unit of the same layer had a mean
    response within 5 %, so that the nearest one was taken.
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
        """The chosen units as bool [layers, units]."""
        mask = torch.zeros(layers, units, dtype=torch.bool)
        mask[self.layer, self.unit] = True
        return mask


def ranked_segments(stats: UnitStats) -> list[int]:
    """Positions of the segments that enter a ranking: all but the class-only ones."""
    return [i for i, name in enumerate(stats.segments) if name not in stats.class_only]


def merge_segments(stats: UnitStats, scores: Tensor, merge: str = "max") -> Tensor:
    """Scores float64 [layers,segments,units] to [layers,units], without the class-only segments.

    Raises: UsageError for an unknown merge, or statistics of class-only segments alone.
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
    """UnitMem(train) - UnitMem(held-out), float64 [layers,segments,units] in [-1,1], on matched sets.

    Raises: UsageError without held-out statistics, or where there is no training set of their size and classes.
    """
    return matched_to(stats, heldout).unitmem() - heldout.unitmem()


def matched_to(stats: UnitStats, heldout: UnitStats | None) -> UnitStats:
    """``stats``, or that part of it, which has the held-out set's size and classes, to within 2 % or an image.

    Raises: UsageError where there is none: UnitMem grows with the number of images, so other sets do not compare.
    """
    if heldout is None:
        raise UsageError("expected held-out statistics with by='gap', got none: score with --heldout, pass heldout=")
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
    """As ``matched_to``, None where neither all training images nor the part kept apart has that size and classes."""
    allowed = max(1, 0.02 * heldout.count)
    return next((s for s in (stats, stats.matched) if s is not None and _differ(s, heldout) <= allowed), None)


def _differ(stats: UnitStats, heldout: UnitStats) -> int:
    labels = stats.class_counts.keys() | heldout.class_counts.keys()
    return sum(abs(stats.class_counts.get(c, 0) - heldout.class_counts.get(c, 0)) for c in labels)


# by -> score of every unit and segment; lowest is UnitMem from the other end
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
    """Choose n = max(1, round(fraction * layers * units)) units.

    by: a score to rank by, highest first with ties by (layer, unit): unitmem, gap (needs ``heldout``), within-class,
    class-selectivity, mean, variance; or a control: lowest (UnitMem, lowest first), random, or matched (for every unit
    of ``matched_with``, by default the selection by UnitMem, another one of the same layer whose mean response is
    within 5 %); or scores (yours, float [layers, units] in ``scores``); scope: "global", or "per-layer" for the same
    number of units in every layer to within one; merge: how a unit's segments become one score, "max", "mean" or "sum";
    seed: of random and matched.

    Raises: UsageError for an unknown word, a fraction outside (0, 1], missing or unmatched held-out statistics, scores
    of another shape, or a matched selection for which there are too few other units.
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
    if by == "scores":
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
    """Layers and units of the highest scores [layers, units], best first; ties by (layer, unit)."""
    layers, units = scores.shape
    total = max(1, round(fraction * layers * units))
    if scope == "global":
        chosen = scores.flatten().argsort(descending=True, stable=True)[:total]
    else:
        # the same number in every layer to within one; the first layers take what is left over
        best = scores.argsort(dim=1, descending=True, stable=True)
        quota = [total // layers + (i < total % layers) for i in range(layers)]
        kept = torch.cat([i * units + best[i, :n] for i, n in enumerate(quota)]).sort().values
        chosen = kept[scores.flatten()[kept].argsort(descending=True, stable=True)]
    return chosen // units, chosen % units


def _matched(stats: UnitStats, target: Selection, merge: str, seed: int) -> Selection:
    """For every unit of ``target`` another one of the same layer with a mean response within 5 %, drawn at random.

    Units with the fewest partners choose first. Where none is left, the unit nearest in mean response is taken.
    """
    means = merge_segments(stats, stats.mean, merge)
    unitmem = merge_segments(stats, stats.unitmem(), merge)
    layers, units = means.shape
    generator = torch.Generator().manual_seed(seed)
    taken = target.mask(layers, units)
    crowded = taken.sum(1) > units // 2
    if crowded.any():
        layer = int(crowded.nonzero()[0])
        raise UsageError(
            f"expected at most half of a layer's units to match, got {int(taken[layer].sum())} of {units} in layer "
            f"{layer}: select a smaller fraction"
        )
    partner = torch.empty(len(target), dtype=torch.int64)
    unmatched = 0
    # relative distance of every target to every unit of its layer
    own = means[target.layer, target.unit]
    distance = (means[target.layer] - own[:, None]).abs() / own[:, None].clamp_min(torch.finfo(torch.float64).tiny)
    distance[taken[target.layer]] = torch.inf
    free_partners = (distance <= TOLERANCE).sum(1)
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
