"""Format a sweep as text tables: its rows, its comparisons, the results of a search, and further attacks on edits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastmem.extraction.verdicts import Count
from fastmem.quality.losses import TEMPERED
from fastmem.report.markdown import markdown_table
from fastmem.sweep.comparisons import EQUAL_QUALITY
from fastmem.sweep.plan import DRAWN, Row, percent

# comparisons with a corrected p-value up to this are always shown
STANDS_OUT = 0.05
ROW_FIELDS = tuple(Row.__dataclass_fields__)


def row_of(record: dict[str, Any]) -> Row:
    """Return the row, an edit with its seed, of a record in a document."""
    return Row(**{name: record[name] for name in ROW_FIELDS})


def row_table(document: Mapping[str, Any]) -> str:
    """Return a table with a line for every edit, from the document of a sweep.

    Random and matched units are shown by the mean, the lowest and the highest number of extracted targets over seeds.
    """
    cost, total = document["cost"], document["reported_targets"]
    seeds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in document["rows"]:
        seeds[row_of(record).title].append(record)
    front = {row_of(document["rows"][i]).title for i in document["pareto"]}
    body = []
    for name, records in seeds.items():
        if records[0]["missing"]:
            body.append((name, "not available", records[0]["missing"], "", ""))
            continue
        counts = np.array([r["reported"] for r in records])
        costs = np.array([r["metrics"][cost] for r in records])
        drawn = records[0]["by"] in DRAWN
        extracted = (
            f"{counts.mean():.1f}, {counts.min()} to {counts.max()}" if drawn else str(Count(int(counts[0]), total))
        )
        body.append((name, str(len(records)), extracted, f"{costs.mean():.4f}", "*" if name in front else ""))
    return markdown_table(("edit", "seeds", "extracted", cost, "front"), body)


def told_comparisons(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the comparisons to show: those at fractions with a comparison at equal quality, and the significant ones.

    Where no fraction has a comparison at equal quality, all are shown.
    """
    declared = {c["fraction"] for c in comparisons if c["rival"] == EQUAL_QUALITY}
    return [c for c in comparisons if not declared or c["fraction"] in declared or c["holm"] <= STANDS_OUT]


def comparison_table(comparisons: Sequence[dict[str, Any]]) -> str:
    """Return a table with a line for every comparison."""
    body = []
    for c in comparisons:
        d = c["difference"]
        rival = c["rival"] if c["rival_factor"] == c["factor"] else f"{c['rival']}, x{c['rival_factor']:.2f}"
        body.append(
            (
                f"{c['by']} {percent(c['fraction'])} x{c['factor']:g}",
                rival + ("" if c["reached"] else " (not reached)"),
                f"{c['extracted']:.0f}",
                f"{c['rival_extracted']:.1f}",
                f"{d['value']:+.1f} ({ends_text(d, '+.1f')})",
                "undefined" if math.isnan(c["holm"]) else f"{c['holm']:.4f}",
                f"{c['cost']:+.4f}",
                f"{c['rival_cost']:+.4f}",
            )
        )
    head = ("edit", "beside", "extracted", "there", "difference (95 %)", "p (Holm)", "quality loss", "there")
    return markdown_table(head, body)


def search_table(document: Mapping[str, Any]) -> str:
    """Return a table with a line for every recipe that reached the reduction, from the document of a search."""
    body = [
        (
            row_of(r).title,
            str(r["units"]),
            f"{r['reduction']:.0%}",
            f"{r['seen_reduction']:.0%}",
            f"{r['cost']:+.4f}",
            "" if r["confirmation"] is None else interval_text(r["confirmation"]["cost"]),
            f"{r['metrics'][TEMPERED]:.3f}",
        )
        for r in document["reached"]
    ]
    rise = f"rise of {document['cost']}"
    head = ("edit", "units", "reduction", "of the half that attribution saw", rise, "by fresh samples (95 %)", TEMPERED)
    return markdown_table(head, body)


def interval_text(estimate: dict[str, float]) -> str:
    """Return the text of an estimate with its interval."""
    return f"{estimate['value']:+.4f} ({ends_text(estimate, '+.4f')})"


def ends_text(found: Mapping[str, float], spec: str) -> str:
    """Return the text of an interval's ends, written by ``spec``, or of one that is undefined."""
    return "undefined" if math.isnan(found["low"]) else f"{found['low']:{spec}} to {found['high']:{spec}}"


def search_sentence(document: Mapping[str, Any]) -> str:
    """Return a sentence that says whether an edit costs less than halving by UnitMem, from the document of a search."""
    plain, reached = document["plain_halving"], document["reached"]
    if plain is None:
        goal = f"a reduction of {document['target_reduction']:.0%}"
        return f"halving by UnitMem does not reach {goal}; other edits that do: {len(reached)}"
    start = (
        f"halving by UnitMem takes {percent(plain['fraction'])} of all units and costs "
        f"{interval_text(plain['confirmation']['cost'])} of {document['cost']}"
    )
    beating = [r for r in reached if r["beats_plain"]]
    if not beating:
        return f"{start}; nothing that was searched surely costs less"
    best = min(beating, key=lambda r: r["confirmation"]["cost"]["value"])
    halved = best["confirmation"]["beside_half"]
    verdict = (
        "surely at most half" if halved["high"] <= 0 else "surely more than half" if halved["low"] > 0 else "about half"
    )
    return (
        f"{start}; edits that surely cost less: {len(beating)}, the cheapest "
        f"{interval_text(best['confirmation']['cost'])}, {verdict}: {row_of(best).title}"
    )


def attack_table(found: dict[str, Any]) -> str:
    """Return a table with a line for every attack on one edit, and a line for every attacker who scales rows back.

    ``found`` is the record of the attacks in a document.
    """
    body = [
        (a["approach"], str(a["prefix"]), str(a["targets"]), str(a["before"]), str(a["after"]))
        for a in found["attempts"]
    ]
    parts = [
        f"{Row(**found['row']).title}, {found['units']:,} rows scaled",
        markdown_table(("attack", "prefix", "targets", "no edit", "edited"), body),
    ]
    parts += [
        f"scaled back, knowing {r['knows']}: {r['found']:,} rows found, {r['wrong']:,} wrong; "
        f"{r['extracted']} targets extracted"
        for r in found["rescalings"]
    ]
    return "\n".join(parts)
