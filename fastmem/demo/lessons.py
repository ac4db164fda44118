"""What a demo has taught, in five sentences, each number beside its control."""

from __future__ import annotations

from fastmem.extraction.verdicts import Count
from fastmem.ranking.selection import CONTROLS
from fastmem.report.page.story import FinishedExtraction, Story
from fastmem.report.page.trade_off import measured_edits


def lessons(story: Story, tokens: int) -> list[str]:
    """Return five sentences on a run with held-out images, an extraction, an edit, its control and their quality.

    ``tokens`` is the number of tokens of an image.
    """
    main = story.main
    # the demo has run every stage that these are made of
    assert main is not None
    return [_came_back(story, main, tokens), _losses(story), _units(story), _edits(story, main), _cost(story)]


def _came_back(story: Story, main: FinishedExtraction, tokens: int) -> str:
    d, key = main.document, main.longest_key
    count, other = Count(d.extracted[key], d.candidates), Count(d.heldout_extracted[key], d.heldout_candidates)
    return (
        f"1. From {key} of their {tokens} tokens, {story.inputs.model} gives back {count} of the training images that "
        f"it predicts best, and {other} of images that it has never seen."
    )


def _losses(story: Story) -> str:
    found = story.score.membership["loss"]
    # the demo has enough images of both sets
    assert found.auc_low is not None
    assert found.auc_high is not None
    told = "tells" if found.auc_low > 0.5 else "does not surely tell"
    return (
        f"2. Its loss {told} training images from others: AUC {found.auc:.2f} ({found.auc_low:.2f} to "
        f"{found.auc_high:.2f}), where chance is 0.50."
    )


def _units(story: Story) -> str:
    gap = story.score.gap
    assert gap is not None
    ends = [f"{name} {m.mean:+.3f} ({m.low:+.3f} to {m.high:+.3f})" for name, m in gap.mean.items()]
    apart = any(m.low > 0 for m in gap.mean.values())
    told = (
        "is higher on training than on held-out images" if apart else "is no higher on training than on held-out images"
    )
    return f"3. UnitMem {told}: {', '.join(ends)}, and {gap.called:,} of {gap.tested:,} units stand out."


def _edits(story: Story, main: FinishedExtraction) -> str:
    counts = {
        e.document.edit: Count(e.document.extracted[e.longest_key], e.document.candidates) for e in story.extractions
    }
    parts = []
    for plan in story.edits:
        share = f"{100 * len(plan) / (plan.layers * plan.units):.3g} % of the units"
        which = f"random {share}" if plan.by in CONTROLS else f"the top {share} by {plan.by}"
        parts.append((plan.by in CONTROLS, f"halving {which} leaves {counts[plan.name].k} of {counts[plan.name].n}"))
    told = ", and ".join(text for _, text in sorted(parts))
    return f"4. Without an edit {counts[None].k} of {counts[None].n} come back; {told}."


def _cost(story: Story) -> str:
    edits = measured_edits(story)
    assert edits is not None
    rows = [row for row in edits["rows"] if row["edit"] is not None and not row["control"] and row["cost"] is not None]
    cost = f"raises {edits['cost']} by {rows[0]['cost']:+.3f}" if rows else "has a cost that was not measured"
    return f"5. That edit {cost}, and it protects a model that others sample from, not weights that they hold."
