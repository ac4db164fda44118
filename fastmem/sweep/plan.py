"""Which edits a sweep measures, in which order: explicit rows, each with a name of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from fastmem.errors import UsageError
from fastmem.ranking.selection import CONTROLS, MERGES, SCOPES, SELECTIONS

HALVED = 0.5
FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20)
# "lowest" is a ranking and has no seed
DRAWN = ("random", "matched")
# what the plan offers beside fastmem.select's own: scores from gradients, made anew for every model
ATTRIBUTION = "attribution"
RANKINGS = (*(by for by in SELECTIONS if by not in (*CONTROLS, "scores")), ATTRIBUTION)
SELECTED = ("unitmem", "gap", "within-class", "class-selectivity", ATTRIBUTION, "lowest", *DRAWN)
# factors for random units between no edit and none of the unit left, to find those of equal quality
EQUAL_QUALITY_FACTORS = (0.75, 0.25, 0.0)


def percent(fraction: float) -> str:
    """A share in words."""
    return f"{100 * fraction:.3g} %"


@dataclass(frozen=True)
class Row:
    """One edit of the plan.

    by: a selection, or "none" for the unedited model; fraction: share of all units; factor: of the chosen rows; seed:
    of the samples, and of the units where these are random or matched; scope, merge: as ``fastmem.select``; graded:
    ``factor`` is the best unit's and the others' rise to 1 with falling score; rounds: the units are chosen in so many
    parts of equal size, each scored on the model that the parts before have edited.
    """

    by: str
    fraction: float = 0.0
    factor: float = 1.0
    seed: int = 0
    scope: str = "global"
    merge: str = "max"
    graded: bool = False
    rounds: int = 1

    @property
    def key(self) -> str:
        """The row's name on disk: 16 hexadecimal digits of its settings' SHA-256."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def drawn(self) -> bool:
        """Whether the seed draws the units."""
        return self.by in DRAWN

    @property
    def title(self) -> str:
        """The edit in words, without its seed."""
        if self.by == "none":
            return "no edit"
        extras = [f"x{self.factor:g}" + (" to 1 by score" if self.graded else "")]
        extras += ["per layer"] if self.scope == "per-layer" else []
        extras += [f"{self.rounds} rounds"] if self.rounds > 1 else []
        return f"{self.by} {percent(self.fraction)} {', '.join(extras)}"


NO_EDIT = Row("none")


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep goes through.

    fractions, factors, by: every combination is a row for each seed; seeds: of random and matched units; declared:
    the fraction that was named before anything was measured. There, at the first factor, these have ``declared_seeds``
    seeds and the other selections ``seeds`` of the samples; the unedited model has ``declared_seeds`` of them.
    equal_quality: those of the fractions at which random units of equal quality are looked for, the declared one when
    None; scope, merge: of every selection.

    Raises: UsageError for an unknown selection, scope or merge, a fraction outside (0, 1], equal quality at another
    fraction than the edits', a factor outside [0, 1) or fewer than 1 seed.
    """

    declared: float
    fractions: tuple[float, ...] = FRACTIONS
    factors: tuple[float, ...] = (HALVED,)
    by: tuple[str, ...] = SELECTED
    seeds: int = 3
    declared_seeds: int = 20
    equal_quality: tuple[float, ...] | None = None
    scope: str = "global"
    merge: str = "max"

    def __post_init__(self) -> None:
        known = (*RANKINGS, *CONTROLS)
        for by in self.by:
            if by not in known:
                raise UsageError(f"expected selections out of {', '.join(known)}, got {by!r}")
        for fraction in (*self.fractions, *(self.equal_quality or ())):
            if not 0 < fraction <= 1:
                raise UsageError(f"expected fractions of the units above 0 and up to 1, got {fraction}")
        for fraction in self.equal_quality or ():
            if fraction not in self.fractions:
                raise UsageError(
                    f"expected equal quality at one of the fractions {', '.join(map(percent, self.fractions))}, got "
                    f"{percent(fraction)}: add it there"
                )
        if self.scope not in SCOPES:
            raise UsageError(f"expected scope as one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.merge not in MERGES:
            raise UsageError(f"expected merge as one of {', '.join(MERGES)}, got {self.merge!r}")
        for factor in self.factors:
            if not 0 <= factor < 1:
                raise UsageError(f"expected factors of at least 0 and below 1, got {factor}")
        if min(self.seeds, self.declared_seeds) < 1:
            raise UsageError("expected at least 1 seed of random and matched units, got fewer: raise --seeds")


def plan_rows(settings: SweepSettings) -> tuple[Row, ...]:
    """Every row once: the unedited model first, then by fraction, factor and selection."""
    unedited = (replace(NO_EDIT, seed=seed) for seed in range(settings.declared_seeds))
    return tuple(dict.fromkeys((*unedited, *_edits(settings), *_equal_quality(settings))))


def _edits(settings: SweepSettings) -> Iterator[Row]:
    for fraction in settings.fractions:
        for factor in settings.factors:
            for by in settings.by:
                for seed in range(
                    _seeds(settings, by, fraction == settings.declared and factor == settings.factors[0])
                ):
                    yield Row(by, fraction, factor, seed, settings.scope, settings.merge)


def _seeds(settings: SweepSettings, by: str, declared: bool) -> int:
    if by in DRAWN:
        return max(settings.seeds, settings.declared_seeds) if declared else settings.seeds
    return settings.seeds if declared else 1


def _equal_quality(settings: SweepSettings) -> Iterator[Row]:
    declared = [settings.declared] if settings.declared in settings.fractions and "random" in settings.by else []
    for fraction in declared if settings.equal_quality is None else settings.equal_quality:
        for factor in sorted({*settings.factors, *EQUAL_QUALITY_FACTORS}, reverse=True):
            for seed in range(settings.seeds):
                yield Row("random", fraction, factor, seed, settings.scope, settings.merge)


def plan_hash(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows in order, as hex."""
    return hashlib.sha256("\n".join(row.key for row in rows).encode()).hexdigest()
