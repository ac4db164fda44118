"""Controls on a tiny model: which units the images of each dose own, and how well the loss identifies such images.

The dose of a training image is the number of times that it is shown per epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.demo.doses import groups
from fastmem.demo.memorisation import DOSE_FILE
from fastmem.ranking.ownership import GroupShare, group_shares, owned_units, owners, pooled_owned
from fastmem.ranking.selection import required, select
from fastmem.report.markdown import markdown_table
from fastmem.scoring.membership import Membership, interval_text, loss_scores, membership
from fastmem.scoring.score import ScoreResult

# share of units that count as top units
FRACTION = 0.05
# name of the group of held-out images
HELDOUT = "held-out"
TITLES = {
    "unitmem": "UnitMem",
    "within-class": "within-class UnitMem",
    "gap": "gap (matched sets)",
    "pooled": "UnitMem over training and held-out images together (matched sets)",
}


def dose_groups(manifest: Manifest) -> np.ndarray:
    """Return the group of every training image, strings [N] in manifest order: its dose, or "twins".

    The images in "twins" have a near-duplicate in the training set.
    """
    shipped = groups(json.loads(DOSE_FILE.read_text()))
    group_of = {name: group for group, names in shipped.items() for name in names}
    return np.array([group_of[name] for name in manifest.names.tolist()])


def ownership(result: ScoreResult, manifests: Mapping[str, Manifest]) -> dict[str, list[GroupShare]]:
    """Return, for each ranking, the share of the top 5 % of units that the images of each dose own.

    The rankings "gap" and "pooled" only use the part of the training images that has the size and classes of the
    held-out set. The ranking "pooled" is by UnitMem over these images and the held-out images together. ``result`` is a
    scoring run, and ``manifests`` are its images by set, "train" and "heldout".
    """
    stats, heldout = result.train, required(result.heldout)
    # a scoring pass writes what it scored, and its seed, into the statistics
    assert stats.origin is not None
    train_ids, heldout_ids = manifests["train"].ids, manifests["heldout"].ids
    group = dose_groups(manifests["train"])
    mask, _ = manifests["train"].match(manifests["heldout"], stats.origin["seed"])
    found = {}
    for by in ("unitmem", "within-class", "gap"):
        owned = owned_units(train_ids, owners(stats, select(stats, FRACTION, by, heldout=heldout), heldout))
        rows = mask if by == "gap" else np.ones(len(group), dtype=bool)
        found[by] = _in_order(group_shares(owned[rows], group[rows].tolist()))
    mine, theirs = pooled_owned(stats, heldout, train_ids, heldout_ids, FRACTION)
    owned = np.concatenate([mine[mask], theirs])
    found["pooled"] = _in_order(group_shares(owned, [*group[mask].tolist(), *[HELDOUT] * len(theirs)]))
    return found


def _in_order(shares: list[GroupShare]) -> list[GroupShare]:
    return sorted(shares, key=lambda row: place(row.group))


def place(group: str) -> tuple[bool, bool, int]:
    """Return the sort key of a group: doses in rising order, then near-duplicates, then held-out images."""
    return group == HELDOUT, not group.isdecimal(), int(group) if group.isdecimal() else 0


def membership_by_dose(result: ScoreResult, manifest: Manifest) -> dict[str, dict[str, Membership]]:
    """Return how well losses separate each group of training images from all held-out images, by group and score.

    ``result`` is a scoring run that kept losses, and ``manifest`` lists its training images.
    """
    train, heldout = result.train_losses, result.heldout_losses
    # the demo scores both sets and asks for losses
    assert train is not None
    assert heldout is not None
    scores = loss_scores(train, heldout)
    group = dose_groups(manifest)
    names = sorted(set(group.tolist()), key=place)
    return {
        name: {by: membership(members[group == name], others) for by, (members, others) in scores.items()}
        for name in names
    }


def format_ownership(found: Mapping[str, list[GroupShare]]) -> str:
    """Return a Markdown table for each ranking, from the result of ``ownership``."""
    head = ("shown per epoch", "images", "own a top unit", "share of top units", "95 %", "chance", "95 % of chance")
    parts = []
    for by, rows in found.items():
        body = [
            (
                r.group,
                str(r.images),
                str(r.owning),
                f"{r.share:.1%}",
                interval_text(r.low, r.high, ".1%"),
                f"{r.chance:.1%}",
                interval_text(r.chance_low, r.chance_high, ".1%"),
            )
            for r in rows
        ]
        parts.append(f"Top {FRACTION:.0%} of units by {TITLES[by]}:\n\n{markdown_table(head, body)}")
    return "\n\n".join(parts)


def format_membership(found: Mapping[str, Mapping[str, Membership]]) -> str:
    """Return a Markdown table with a row for every group, from the result of ``membership_by_dose``."""
    scores = list(next(iter(found.values())))
    names = {"loss": "loss", "guided": "loss without a class - with it"}
    head = ["shown per epoch", "images"]
    for by in scores:
        head += [f"AUC, {names[by]}", "found at 1 % false alarms"]
    body = []
    for group, rows in found.items():
        cells = [group, str(rows["loss"].members)]
        for m in (rows[by] for by in scores):
            cells += [
                f"{m.auc:.2f} ({interval_text(m.auc_low, m.auc_high, '.2f')})",
                f"{m.tpr:.0%} ({interval_text(m.tpr_low, m.tpr_high, '.0%')})",
            ]
        body.append(cells)
    return markdown_table(head, body)
