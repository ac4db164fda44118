"""The findings of a sweep: its rows, best trade-offs and comparisons, as a JSON document and as a parquet table."""

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

# metrics that rise as quality falls, best first; the first one needs samples
SAMPLED_COST = "kd-sscd"
COSTS = (SAMPLED_COST, TEMPERED, f"loss_{HELDOUT}")


@dataclass(frozen=True, eq=False)
class Findings:
    """The findings of a sweep.

    Attributes:
        measured: the rows of the table, in order.
        targets: the targets, and which of them are reported.
        cost: the metric whose rise is the loss of quality.
        comparisons: every selection compared with its rivals.
        pareto: positions, in ``measured``, of the edits on the Pareto front of extracted targets against cost; each
            edit is compared by its means over the seeds, and stands at the position of its first seed.
    """

    measured: tuple[Measured, ...]
    targets: TargetSet
    cost: str
    comparisons: tuple[Comparison, ...]
    pareto: tuple[int, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return a record of every row: settings, counts and metrics, which are null or empty where it is missing."""
        return [self._record(m) for m in self.measured]

    def document(self) -> dict[str, Any]:
        """Return the findings as a dictionary for a JSON document."""
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
        # without the seconds, which the row's file has: equal results make equal tables
        record = asdict(m.row) | {"units": m.units, "missing": m.missing}
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
    """Return the findings of a table: its rows, the comparisons of its selections, and its Pareto front.

    ``measured`` are the rows, among them the unedited model. ``targets`` says which targets are reported. ``cost`` is
    the metric whose rise is the loss of quality; every row must have it.
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
    """Return the positions of the rows on the Pareto front, cheapest first.

    A row is on the front unless another row has at most the same number of ``extracted`` targets and at most the same
    cost in ``costs``, and less of one of them. Of rows that are equal in both, only the first is returned.
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], extracted[i], i)):
        if not front or extracted[i] < extracted[front[-1]]:
            front.append(i)
    return front


def write_sweep_table(path: Path, findings: Findings) -> None:
    """Write a parquet file with one row for every row of the sweep, and a column for every metric, prefix and group.

    Raises: UsageError where the folder cannot be written.
    """
    import pyarrow

    flat = []
    for i, record in enumerate(findings.rows()):
        nested = {name: record.pop(name) for name in ("by_prefix", "by_group", "metrics")}
        flat.append(record | {"pareto": i in findings.pareto} | _columns(nested))
    write_table(path, pyarrow.Table.from_pylist(_same_keys(flat)))


def _columns(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the entries of nested records by the names of their columns."""
    named = {"by_prefix": "extracted_prefix_", "by_group": "extracted_group_", "metrics": ""}
    return {f"{named[kind]}{name}": value for kind, values in nested.items() for name, value in values.items()}


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with all columns in each, None where a row lacks one."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]
