"""Do the neurons point at the images? Owners of high units against the verdicts on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastmem.errors import UsageError
from fastmem.extraction.extract import Extraction
from fastmem.ranking.ownership import owned_units, owners
from fastmem.ranking.selection import FRACTION, RANKINGS, find_matched, select
from fastmem.stats import UnitStats


@dataclass(frozen=True)
class Association:
    """How owning a high unit goes with being extracted, over the candidates.

    owners_extracted of owners, others_extracted of others; odds_ratio: conditional maximum likelihood estimate, with
    its exact 95 % interval and Fisher's two-sided p; None where it is not finite or nothing was extracted.
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
        """The numbers for a JSON document."""
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
    """The odds ratio that a candidate which owns a high unit is extracted: bool [N] and bool [N].

    Source: Fisher's exact test and its conditional estimate, as in scipy.stats.contingency.odds_ratio.

    Raises: UsageError where the lengths differ.
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
    """For every ranking, whether candidates that own a unit of its top 5 % are extracted more often than others.

    Counted are the training candidates' completions from the longest prefix.

    Args:
        extraction: the verdicts.
        stats: statistics of the training images.
        heldout: statistics of the held-out images, without which there is no ranking by gap.
    """
    verdicts = extraction.sets["train"]
    candidates = verdicts.targets.take(verdicts.candidate)
    extracted = verdicts.extracted[_longest(extraction)][verdicts.candidate]
    found = {}
    for by in RANKINGS:
        if by == "gap" and (heldout is None or not heldout.count or find_matched(stats, heldout) is None):
            continue
        if by == "within-class" and stats.known_summary is None and stats.rows is None:
            continue
        owned = owned_units(candidates.ids, owners(stats, select(stats, FRACTION, by, heldout=heldout), heldout))
        found[by] = associate(owned > 0, extracted)
    return found


def _longest(extraction: Extraction) -> int:
    return int(np.argmax(extraction.prefixes))
