"""What edits stop against what they cost: the rows of a sweep, and the edits that the other stages have measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmem.extraction.verdicts import Count
from fastmem.quality.losses import TEMPERED
from fastmem.report.page.documents import EvaluationDocument, SweepDocument, SweepRow
from fastmem.report.page.story import Story
from fastmem.sweep.findings import SAMPLED_COST
from fastmem.sweep.plan import DRAWN, NO_EDIT, percent

# metrics that rise as quality falls, best first
COSTS = ("fid", SAMPLED_COST, "kid", TEMPERED)
CONTROLS = (*DRAWN, "lowest")


def sweep_chart(story: Story) -> dict[str, Any] | None:
    """The lines and bands of the sweep's chart; None without a sweep."""
    sweep = story.sweep
    if sweep is None:
        return None
    measured = [r for r in sweep.rows if not r.missing and r.metrics.get(sweep.cost) is not None]
    unedited = [r for r in measured if r.by == NO_EDIT.by]
    if not unedited:
        return None
    before = float(np.mean([_cost(r, sweep) for r in unedited]))
    front = {sweep.rows[i].row.title for i in sweep.pareto if i < len(sweep.rows)}
    chosen = {(plan.by, plan.fraction, float(plan.factor[0])): plan.name for plan in story.edits if len(plan)}
    groups: dict[tuple[str, float], dict[str, list[SweepRow]]] = defaultdict(lambda: defaultdict(list))
    for r in measured:
        groups[r.by, r.factor][r.row.title].append(r)
    lines = []
    for (by, factor), points in groups.items():
        line: dict[str, Any] = {
            "by": by,
            "factor": factor,
            "kind": "none" if by == NO_EDIT.by else "band" if by in DRAWN else "control" if by in CONTROLS else "line",
            "points": [],
        }
        for title, rows in points.items():
            costs, counts = [_cost(r, sweep) - before for r in rows], [r.reported or 0 for r in rows]
            line["points"].append(
                {
                    "title": title,
                    "share": percent(rows[0].fraction),
                    "seeds": len(rows),
                    "cost": [round(float(v), 6) for v in (np.mean(costs), min(costs), max(costs))],
                    "extracted": [round(float(v), 3) for v in (np.mean(counts), min(counts), max(counts))],
                    "front": title in front,
                    "chosen": chosen.get((by, rows[0].fraction, factor)),
                }
            )
        line["points"].sort(key=lambda point: point["cost"][0])
        lines.append(line)
    return {
        "cost": sweep.cost,
        "targets": sweep.reported_targets,
        "prefix": sweep.prefixes[-1],
        "judge": sweep.judge,
        "threshold": sweep.threshold,
        "missing": [f"{r.row.title}: {r.missing}" for r in sweep.rows if r.missing],
        "lines": lines,
    }


def _cost(row: SweepRow, sweep: SweepDocument) -> float:
    value = row.metrics[sweep.cost]
    # rows without it have been left out
    assert value is not None
    return value


def measured_edits(story: Story) -> dict[str, Any] | None:
    """The unedited model and every edit with what was extracted and what samples are worth; None without an edit.

    Only extractions by the judge, the threshold and the longest prefix of the first one can stand beside each other.
    """
    main = story.main
    if main is None or not story.edits:
        return None
    alike = [
        e
        for e in story.extractions
        if (e.document.embedder, e.document.threshold, e.document.prefixes[e.longest])
        == (main.document.embedder, main.document.threshold, main.document.prefixes[main.longest])
        and e.document.settings.top_per_class == main.document.settings.top_per_class
    ]
    qualities: dict[str | None, EvaluationDocument] = {}
    for evaluation in story.evaluations:
        qualities.setdefault(evaluation.edit, evaluation)
    cost = _common_cost(list(qualities.values()))
    before = qualities[None].metrics.get(cost) if cost is not None and None in qualities else None
    plans = {plan.name: plan for plan in story.edits}
    rows: list[dict[str, Any]] = []
    for name in (None, *plans):
        extraction = next((e for e in alike if e.document.edit == name), None)
        found = None if extraction is None else extraction.document
        quality = qualities.get(name)
        value = None if quality is None or cost is None else quality.metrics.get(cost)
        ends = [None if quality is None else quality.metrics.get(f"{cost}-{end}") for end in ("low", "high")]
        key = "" if extraction is None else extraction.longest_key
        plan = None if name is None else plans[name]
        rows.append(
            {
                "edit": name,
                "by": None if plan is None else plan.by,
                "control": plan is not None and plan.by in CONTROLS,
                "units": 0 if plan is None else len(plan),
                "share": None if plan is None else percent(len(plan) / (plan.layers * plan.units)),
                "factor": None if plan is None or not len(plan) else float(plan.factor[0]),
                "extracted": None if found is None else counted(found.extracted[key], found.candidates),
                "heldout": None if found is None else counted(found.heldout_extracted[key], found.heldout_candidates),
                "metrics": [] if quality is None else _metrics(quality),
                "cost": None if value is None or before is None else round(value - before, 6),
                "cost_ends": None
                if None in ends or before is None
                else [round(end - before, 6) for end in ends if end is not None],
            }
        )
    return {"cost": cost, "prefix": main.document.prefixes[main.longest], "judge": main.document.embedder, "rows": rows}


def _common_cost(evaluations: Sequence[EvaluationDocument]) -> str | None:
    """The first of the costs that all evaluations have."""
    return next((c for c in COSTS if evaluations and all(e.metrics.get(c) is not None for e in evaluations)), None)


def _metrics(evaluation: EvaluationDocument) -> list[tuple[str, str]]:
    """Names of the metrics, and their values with intervals in words."""
    told = []
    for name, value in evaluation.metrics.items():
        if name.endswith(("-low", "-high")) or value is None:
            continue
        low, high = (evaluation.metrics.get(f"{name}-{end}") for end in ("low", "high"))
        ends = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
        told.append((name, f"{value:.4g}{ends}"))
    return told


def counted(k: int, n: int) -> dict[str, Any]:
    """A count with its total and the 95 % interval of the share."""
    low, high = Count(k, n).interval
    return {"k": k, "n": n, "low": round(low, 5), "high": round(high, 5)}
