"""What was found, each number with its interval and its control, and what it does not show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastmem.extraction.association import Association
from fastmem.extraction.verdicts import Count
from fastmem.report.page.story import FinishedExtraction, Story
from fastmem.report.page.trade_off import CONTROLS
from fastmem.reporter import count_of

RANKING_NAMES = {"unitmem": "UnitMem", "within-class": "within-class UnitMem", "gap": "gap"}


@dataclass(frozen=True)
class Finding:
    """One number of the summary.

    Attributes:
        what: what was measured.
        value: the number.
        interval: its 95 % interval; empty where there is none.
        control: the same number where nothing was memorised; empty where there is none.
        reading: a sentence that says what follows; empty where nothing does.
    """

    what: str
    value: str
    interval: str = ""
    control: str = ""
    reading: str = ""


@dataclass(frozen=True)
class Tile:
    """A number in large letters, with a word above it and a line below."""

    label: str
    value: str
    note: str


def tiles(story: Story) -> list[Tile]:
    """The four numbers that a reader wants first; those of stages that have not run are left out."""
    stats, main = story.train, story.main
    held = story.heldout
    layers, _, units = stats.shape
    found = [
        Tile(
            "scored",
            f"{stats.count:,} images",
            f"{layers * units:,} units in {layers} blocks" + ("" if held is None else f", {held.count:,} held out"),
        )
    ]
    if main is not None:
        d, key = main.document, main.longest_key
        count = Count(d.extracted[key], d.candidates)
        found.append(Tile("extracted", f"{count.k:,} of {count.n:,}", f"95 %: {_share(count)}, from {key} tokens"))
        other = Count(d.heldout_extracted[key], d.heldout_candidates)
        if other.n:
            found.append(Tile("held-out control", f"{other.k:,} of {other.n:,}", f"95 %: {_share(other)}"))
    for extraction in story.extractions:
        d = extraction.document
        plan = next((p for p in story.edits if p.name == d.edit), None)
        if plan is not None and plan.by not in CONTROLS:
            count = Count(d.extracted[extraction.longest_key], d.candidates)
            note = f"95 %: {_share(count)}{_beside_control(story, extraction)}"
            found.append(Tile(f"after the edit {d.edit}", f"{count.k:,} of {count.n:,}", note))
            break
    return found


def _beside_control(story: Story, extraction: FinishedExtraction) -> str:
    """What came back under a control with as many units, for a note; empty without one."""
    controls = {plan.name: plan for plan in story.edits if plan.by in CONTROLS}
    for other in story.extractions:
        d, plan = other.document, controls.get(other.document.edit or "")
        if plan is not None and d.prefixes[other.longest] == extraction.document.prefixes[extraction.longest]:
            return f"; {plan.by} units: {d.extracted[other.longest_key]:,} of {d.candidates:,}"
    return ""


def findings(story: Story) -> list[Finding]:
    """Everything that was measured of the run as a whole."""
    return [*_of_extractions(story), *_of_losses(story), *_of_units(story)]


def _of_units(story: Story) -> Iterator[Finding]:
    for by, own in story.score.reliability.items():
        name = RANKING_NAMES.get(by, by)
        spearman = "" if own.spearman is None else f"; rank correlation {own.spearman:.2f}"
        yield Finding(
            f"Ranking by {name} on two halves of the images",
            f"{100 * own.overlap:.0f} % of the top {100 * own.fraction:.0f} % agree{spearman}",
            control=f"{100 * own.chance:.0f} % by chance",
            reading="how far the ranking is more than noise",
        )
    for score, need in story.score.undefined.items():
        yield Finding(f"{RANKING_NAMES.get(score, score)}", "undefined", reading=f"it needs {need}")
    gap = story.score.gap
    if gap is None:
        return
    for segment, mean in gap.mean.items():
        apart = mean.low > 0 or mean.high < 0
        yield Finding(
            f"UnitMem on training minus held-out images, {segment}, mean over units",
            f"{mean.mean:+.3f}",
            f"{mean.low:+.3f} to {mean.high:+.3f}",
            f"0, of {gap.images:,} matched images each",
            "units answer otherwise to training images"
            if apart
            else "units answer to outliers of either set alike: UnitMem alone does not show training",
        )
    yield Finding(
        "Units whose gap stands out",
        f"{gap.called:,} of {gap.tested:,}",
        control=f"at a false-discovery rate of {100 * gap.false_discovery_rate:.0f} %",
    )


def _of_losses(story: Story) -> Iterator[Finding]:
    names = {"loss": "loss", "guided": "loss without a class minus with it"}
    for by, m in story.score.membership.items():
        yield Finding(
            f"Telling training from held-out images by {names.get(by, by)} (AUC)",
            f"{m.auc:.3f}",
            _ends(m.auc_low, m.auc_high, 1, 3),
            "0.5 where nothing tells them apart",
        )
        yield Finding(
            f"Training images found at 1 % false alarms by {names.get(by, by)}",
            f"{100 * m.tpr:.1f} %",
            _ends(m.tpr_low, m.tpr_high, 100, 1) + " %" * (m.tpr_low is not None),
            f"1 %, of {m.members:,} against {m.nonmembers:,} images",
        )


def _of_extractions(story: Story) -> Iterator[Finding]:
    for extraction in story.extractions:
        d, key = extraction.document, extraction.longest_key
        under = "" if d.edit is None else f" under the edit {d.edit}"
        other = Count(d.heldout_extracted[key], d.heldout_candidates)
        control = f"held out: {other.k:,} of {other.n:,} ({_share(other)})" if other.n else "no held-out images"
        count = Count(d.extracted[key], d.candidates)
        yield Finding(
            f"Extracted from {key} tokens{under}, by {d.embedder} above {d.threshold}",
            f"{count.k:,} of {count.n:,} candidates",
            _share(count),
            control,
        )
        if d.edit is None:
            yield from _of_unedited(extraction)


def _of_unedited(extraction: FinishedExtraction) -> Iterator[Finding]:
    d, key = extraction.document, extraction.longest_key
    if d.matched_candidates != d.candidates:
        count = Count(d.matched_extracted[key], d.matched_candidates)
        yield Finding(
            "The same among images that match the held-out set",
            f"{count.k:,} of {count.n:,}",
            _share(count),
            reading="the fair side of the control: chosen from equally many images",
        )
    yield Finding(
        "Near-duplicates counted once", f"{d.extracted_distinct[key]:,}", reading="twins in the set come back together"
    )
    original = d.extracted_original[key]
    if original is not None:
        count = Count(original, d.candidates)
        top = "" if d.ceiling is None else f"the ceiling: {count_of(d.ceiling, 'reconstruction')} reach the image"
        yield Finding("Against the image itself, not its reconstruction", f"{original:,}", _share(count), top)
    alarm, at_alarm = d.false_alarm_threshold[key], d.extracted_at_false_alarms[key]
    if alarm is not None and at_alarm is not None:
        count = Count(at_alarm, d.candidates)
        yield Finding(
            f"Above {alarm:.3f} instead, which 1 % of the held-out candidates pass",
            f"{count.k:,} of {count.n:,}",
            _share(count),
        )
    for by, found in d.associations.items():
        yield _association(RANKING_NAMES.get(by, by), found)


def _association(name: str, found: Association) -> Finding:
    odds = "no odds ratio" if found.odds_ratio is None else f"odds ratio {found.odds_ratio:.2f}"
    ends = ["infinite" if end is None else f"{end:.2f}" for end in (found.low, found.high)]
    return Finding(
        f"Owners of the top 5 % of units by {name} among the extracted",
        f"{found.owners_extracted:,} of {found.owners:,}; {odds}",
        "" if found.odds_ratio is None else f"{ends[0]} to {ends[1]}",
        f"others: {found.others_extracted:,} of {found.others:,}",
    )


def limits(story: Story) -> list[str]:
    """What the numbers do not show, as sentences."""
    said = [
        f"{story.caution[0].upper()}{story.caution[1:]}.",
        "What did not come back may be memorised all the same: one attack was tried, with true first tokens and greedy "
        "completion, on the images that the model predicts best.",
        "A unit of high UnitMem reacts to one image far more than to others. That image may be an outlier; the gap to "
        "held-out images and the extraction say whether it was learnt.",
    ]
    if story.heldout is None:
        said.append("There are no held-out images, so no number here has that control: score with --heldout.")
    if story.main is not None and story.main.document.embedder == "token-match":
        said.append("Verdicts compare tokens, not pictures, because no SSCD model was there.")
    if story.main is not None and story.main.document.index is None:
        said.append(
            "Completions were compared with their own target alone: without an index (fastmem index) a completion may "
            "be another training image and not be noticed."
        )
    if story.edits and not any(plan.by in CONTROLS for plan in story.edits):
        said.append("No edit of random units stands beside the others, so what an edit stops has no control.")
    said += [f"Quality: {note}." for e in story.evaluations for note in e.notes]
    return list(dict.fromkeys(said))


def _ends(low: float | None, high: float | None, scale: int, digits: int) -> str:
    """An interval in words, its ends times ``scale``; one of too few images is undefined."""
    return "undefined" if low is None or high is None else f"{scale * low:.{digits}f} to {scale * high:.{digits}f}"


def _share(count: Count) -> str:
    low, high = count.interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"
