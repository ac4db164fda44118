"""Test whether the images that own high-scoring units are extracted more often than other images.

An image owns a unit when it is the training image with the largest response of that unit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastmem.errors import UsageError
from fastmem.extraction.extract import Extraction
from fastmem.ranking.ownership import owned_units, owners
from fastmem.ranking.selection import FRACTION, possible_rankings, select
from fastmem.stats import UnitStats


@dataclass(frozen=True)
class Association:
    """How often candidates that own a high-scoring unit are extracted, compared with the other candidates.

    The odds ratio and the ends of its interval are None where they are infinite. All three are None where no candidate
    or every candidate owns such a unit, and where no candidate or every candidate is extracted.

    Attributes:
        owners: number of candidates that own at least one such unit.
        owners_extracted: number of these that are extracted.
        others: number of candidates that own no such unit.
        others_extracted: number of these that are extracted.
        odds_ratio: conditional maximum likelihood estimate of the odds ratio, or None.
        low: lower end of its exact 95 % interval, or None.
        high: upper end of its exact 95 % interval, or None.
        p_value: two-sided p-value of Fisher's exact test.
    """

    owners: int
    owners_extracted: int
    others: int
    others_extracted: int
    odds_ratio: float | None
    low: float | None
    high: float | None
    p_value: float

    def document(self) -> dict[str, Any]:
        """Return the fields as a dictionary for a JSON document, with floats rounded to six digits."""
        return {key: round(v, 6) if isinstance(v, float) else v for key, v in asdict(self).items()}

    def __str__(self) -> str:
        counts = (
            f"{self.owners_extracted} of {self.owners} owners and {self.others_extracted} of {self.others} other "
            "candidates extracted"
        )
        if self.odds_ratio is None and self.low is None and self.high is None:
            return f"{counts}, no odds ratio"
        ratio, low, high = ("infinite" if v is None else f"{v:.2f}" for v in (self.odds_ratio, self.low, self.high))
        return f"{counts}, odds ratio {ratio} ({low} to {high}), p {self.p_value:.2g}"


def associate(owns: np.ndarray, extracted: np.ndarray) -> Association:
    """Return the odds ratio of being extracted, for candidates that own a high-scoring unit against those that do not.

    ``owns``, bool [N], says which candidates own such a unit; ``extracted``, bool [N], says which are extracted.

    Source: Fisher's exact test and the conditional estimate of scipy.stats.contingency.odds_ratio.

    Raises: UsageError where the two arrays have different lengths.
    """
    from scipy.stats import fisher_exact
    from scipy.stats.contingency import odds_ratio

    if owns.shape != extracted.shape:
        raise UsageError(f"expected as many owners as verdicts, got {len(owns)} and {len(extracted)}")
    table = [
        [int((owns & extracted).sum()), int((owns & ~extracted).sum())],
        [int((~owns & extracted).sum()), int((~owns & ~extracted).sum())],
    ]
    rows, columns = np.sum(table, axis=1), np.sum(table, axis=0)
    ratio = low = high = None
    if rows.all() and columns.all():
        found = odds_ratio(table, kind="conditional")
        interval = found.confidence_interval(0.95)
        ratio, low, high = (
            float(v) if np.isfinite(v) else None for v in (found.statistic, interval.low, interval.high)
        )
    p_value = float(fisher_exact(table).pvalue)
    return Association(int(rows[0]), table[0][0], int(rows[1]), table[1][0], ratio, low, high, p_value)


def find_associations(extraction: Extraction, stats: UnitStats, heldout: UnitStats | None) -> dict[str, Association]:
    """Return, for every ranking of units, whether owners of a unit in its top 5 % are extracted more often than others.

    Only training candidates are counted, with their completions from the longest prefix. A ranking is left out where
    the statistics lack what it needs.

    Args:
        extraction: the verdicts on the candidates.
        stats: statistics of the training images.
        heldout: statistics of the held-out images; None leaves out the ranking by gap.
    """
    verdicts = extraction.sets["train"]
    candidates = verdicts.targets.take(verdicts.candidate)
    extracted = verdicts.extracted[_longest(extraction)][verdicts.candidate]
    found = {}
    for by in possible_rankings(stats, heldout):
        owned = owned_units(candidates.ids, owners(stats, select(stats, FRACTION, by, heldout=heldout), heldout))
        found[by] = associate(owned > 0, extracted)
    return found


def _longest(extraction: Extraction) -> int:
    """Return the position of the longest prefix length."""
    return int(np.argmax(extraction.prefixes))
