"""What a finished table says, as the document that ``--json`` prints and as a parquet table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.files import write_table
from fastmem.quality.losses import HELDOUT, TEMPERED
from fastmem.sweep.comparisons import Comparison, compare_all, sides_of
from fastmem.sweep.plan import Row
from fastmem.sweep.table import Measured, TargetSet, mean_of

# metrics that rise as quality falls, best first; one needs samples
SAMPLED_COST = "kd-sscd"
COSTS = (SAMPLED_COST, TEMPERED, f"loss_{HELDOUT}")


@dataclass(frozen=True, eq=False)
class Findings:
    """What a table says. cost: the metric whose rise is the quality loss; pareto: positions of the rows with the first
    seed of every edit on the front, whose counts and costs are means over its seeds."""

    measured: tuple[Measured, ...]
    targets: TargetSet
    cost: str
    comparisons: tuple[Comparison, ...]
    pareto: tuple[int, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A record of every row: its settings, counts, metrics and costs; counts are null where it is missing."""
        return [self._record(m) for m in self.measured]

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints of it."""
        reported = self.targets.reported
        return {
            "targets": len(reported),
            "reported_targets": int(reported.sum()),
            "prefixes": list(self.targets.prefixes),
            "groups": {name: int(mask.sum()) for name, mask in self.targets.groups.items()},
            "cost": self.cost,
            "rows": self.rows(),
            "pareto": list(self.pareto),
            "comparisons": [asdict(c) for c in self.comparisons],
        }

    def _record(self, m: Measured) -> dict[str, Any]:
        record = asdict(m.row) | {"units": m.units, "seconds": m.seconds, "missing": m.missing}
        if m.missing:
            return record | {"extracted": None, "reported": None, "by_prefix": {}, "by_group": {}, "metrics": {}}
        extracted = self.targets.extracted(m)
        return record | {
            "extracted": int(extracted[-1].sum()),
            "reported": int(extracted[-1, self.targets.reported].sum()),
            "by_prefix": {str(p): int(row.sum()) for p, row in zip(self.targets.prefixes, extracted, strict=True)},
            "by_group": {name: int(extracted[-1, mask].sum()) for name, mask in self.targets.groups.items()},
            "metrics": m.metrics,
        }


def find(measured: Sequence[Measured], targets: TargetSet, cost: str) -> Findings:
    """Compare the rows of a table, the first of which are the unedited model, and find its front.

    cost: a metric of every row that rises as quality falls.
    """
    edits: dict[Row, list[int]] = {}
    for i, m in enumerate(measured):
        if not m.missing:
            edits.setdefault(replace(m.row, seed=0), []).append(i)
    counts = [
        float(np.mean([targets.extracted(measured[i])[-1, targets.reported].sum() for i in at]))
        for at in edits.values()
    ]
    front = pareto_front(counts, [mean_of([measured[i] for i in at], cost) for at in edits.values()])
    firsts = [at[0] for at in edits.values()]
    comparisons = compare_all(sides_of(measured, targets, cost), targets.classes[targets.reported])
    return Findings(tuple(measured), targets, cost, tuple(comparisons), tuple(firsts[i] for i in front))


def pareto_front(extracted: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the rows that no other equals or beats in both numbers, and beats in one; cheapest first.

    Of rows that are equal in both the first stands for all.
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], extracted[i], i)):
        if not front or extracted[i] < extracted[front[-1]]:
            front.append(i)
    return front


def write_sweep_table(path: Path, findings: Findings) -> None:
    """One parquet row for every row of the table, objects as columns of their own.

    Raises: UsageError where the place cannot be written.
    """
    import pyarrow

    flat = []
    for i, record in enumerate(findings.rows()):
        nested = {name: record.pop(name) for name in ("by_prefix", "by_group", "metrics")}
        flat.append(record | {"pareto": i in findings.pareto} | _columns(nested))
    write_table(path, pyarrow.Table.from_pylist(_same_keys(flat)))


def _columns(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    named = {"by_prefix": "extracted_prefix_", "by_group": "extracted_group_", "metrics": ""}
    return {f"{named[kind]}{name}": value for kind, values in nested.items() for name, value in values.items()}


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]
