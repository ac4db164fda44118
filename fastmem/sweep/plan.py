"""The plan of a sweep: the list of its rows, each an edit with a seed, in the order in which they are measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from fastmem.errors import UsageError
from fastmem.ranking.selection import CONTROLS, MERGES, SCOPES, SELECTIONS

# factor of the usual edit
HALVED = 0.5
# shares of all units that are edited by default
FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20)
# the controls that draw units at random with a seed; the third control, "lowest", is a ranking
DRAWN = ("random", "matched")
# a selection that ``fastmem.select`` does not have, because it needs gradients of the model
ATTRIBUTION = "attribution"
RANKINGS = (*(by for by in SELECTIONS if by not in (*CONTROLS, "scores")), ATTRIBUTION)
# selections that are measured by default
SELECTED = ("unitmem", "gap", "within-class", "class-selectivity", ATTRIBUTION, "lowest", *DRAWN)
# further factors of random units, to find the factor at which they cost as much quality as an edit
EQUAL_QUALITY_FACTORS = (0.75, 0.25, 0.0)


def percent(fraction: float) -> str:
    """Return a share in per cent, such as ``5 %``."""
    return f"{100 * fraction:.3g} %"


@dataclass(frozen=True)
class Row:
    """One edit of a plan, with one seed.

    Attributes:
        by: selection that chooses the units, or "none" for the unedited model.
        fraction: share of all units to scale, in [0,1].
        factor: number that the units' rows of fc1 weights are multiplied by.
        seed: seed of the samples, and of random and matched units.
        scope: "global", or "per-layer" for equally many units in every layer.
        merge: how the scores of a unit in several segments are combined: "max", "mean" or "sum".
        graded: whether only the unit of highest score gets ``factor``, and the others factors that rise to 1 as the
            score falls.
        rounds: number of equal parts in which the units are chosen; each part is chosen on the model with the edits of
            the parts before.
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
        """Name of the row's files: the first 16 hexadecimal digits of the SHA-256 of its settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def drawn(self) -> bool:
        """Whether the units are drawn at random with the seed."""
        return self.by in DRAWN

    @property
    def title(self) -> str:
        """A description of the edit for people, without its seed."""
        if self.by == "none":
            return "no edit"
        extras = [f"x{self.factor:g}" + (" to 1 by score" if self.graded else "")]
        extras += ["per layer"] if self.scope == "per-layer" else []
        extras += [f"{self.rounds} rounds"] if self.rounds > 1 else []
        return f"{self.by} {percent(self.fraction)} {', '.join(extras)}"


NO_EDIT = Row("none")


@dataclass(frozen=True)
class SweepSettings:
    """The settings of a sweep, which measures every combination of fraction, factor, selection and seed.

    Attributes:
        declared: the fraction that the main results are stated for, fixed before anything was measured; there, at the
            first factor, more seeds are measured.
        fractions: shares of all units to scale, in (0,1].
        factors: numbers that the units' rows of fc1 weights are multiplied by, in [0,1).
        by: selections that choose the units, among them controls.
        seeds: number of seeds of random and matched units, and at the declared fraction and first factor also of the
            samples of every other selection; elsewhere those have a single seed.
        declared_seeds: number of seeds of random and matched units at the declared fraction and first factor, and of
            the samples of the unedited model.
        equal_quality: fractions at which random units are measured at more factors, to find the factor at which they
            cost as much quality as an edit; None for the declared fraction.
        scope: "global", or "per-layer" for equally many units in every layer.
        merge: how the scores of a unit in several segments are combined: "max", "mean" or "sum".

    Raises: UsageError where a selection, scope or merge is unknown, a number is out of range, or ``equal_quality`` has
    a fraction that ``fractions`` lacks.
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
    """Return the rows of a sweep, each once: the unedited model first, then by fraction, factor, selection and seed."""
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
    """Return the number of seeds of a selection; ``declared`` says whether it is at the declared edit."""
    if by in DRAWN:
        return max(settings.seeds, settings.declared_seeds) if declared else settings.seeds
    return settings.seeds if declared else 1


def _equal_quality(settings: SweepSettings) -> Iterator[Row]:
    """Yield the rows of random units at more factors, for comparisons at equal quality."""
    declared = [settings.declared] if settings.declared in settings.fractions and "random" in settings.by else []
    for fraction in declared if settings.equal_quality is None else settings.equal_quality:
        for factor in sorted({*settings.factors, *EQUAL_QUALITY_FACTORS}, reverse=True):
            for seed in range(settings.seeds):
                yield Row("random", fraction, factor, seed, settings.scope, settings.merge)


def plan_hash(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of the rows in their order, in hexadecimal."""
    return hashlib.sha256("\n".join(row.key for row in rows).encode()).hexdigest()
