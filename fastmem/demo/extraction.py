"""How many training images can be extracted from a tiny model, by how often they were shown per epoch (their dose)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.demo.controls import HELDOUT, dose_groups, place
from fastmem.extraction.extract import Extraction
from fastmem.extraction.verdicts import Count, distinct
from fastmem.report.extraction_report import counts
from fastmem.report.markdown import markdown_table

# more images than any class has, so that all of them are candidates
ALL_IMAGES = 10_000
# names of groups of images
ALONE = f"{HELDOUT}, no near-duplicate"
EVERY, EVERY_GROUP = "all training images", "near-duplicates once"


def extraction_by_dose(extraction: Extraction, manifest: Manifest) -> dict[str, list[Count]]:
    """Return how many images of each group are extracted, one count for every prefix length.

    The groups are the doses, "twins" (images with near-duplicates) and held-out images. Where an index was searched,
    held-out images without a training image above the similarity threshold are one more group. ``manifest`` lists the
    training images.
    """
    train, heldout = extraction.sets["train"], extraction.sets["heldout"]
    group_of = dict(zip(manifest.ids.tolist(), dose_groups(manifest).tolist(), strict=True))
    group = np.array([group_of[i] for i in train.targets.ids.tolist()])
    found = {name: counts(train, group == name) for name in sorted(set(group.tolist()), key=place)}
    found[HELDOUT] = counts(heldout, np.ones(len(heldout.targets), dtype=bool))
    if not np.isnan(heldout.twin_similarity).any():
        found[ALONE] = counts(heldout, heldout.twin_similarity <= extraction.threshold)
    return found


def totals(extraction: Extraction) -> dict[str, list[Count]]:
    """Return how many training images and how many near-duplicate groups are extracted, for every prefix length."""
    train = extraction.sets["train"]
    groups = len(np.unique(train.groups))
    return {
        EVERY: counts(train, np.ones(len(train.targets), dtype=bool)),
        EVERY_GROUP: [Count(distinct(row, train.groups), groups) for row in train.extracted],
    }


def format_extraction(rows: Mapping[str, Sequence[Count]], prefixes: Sequence[int]) -> str:
    """Return a Markdown table with a row for every group, and the count with its 95 % interval for each prefix length.

    ``rows`` are the counts by group, and ``prefixes`` the prefix lengths in tokens.
    """
    head = ["shown per epoch", *(f"from {prefix} tokens" for prefix in prefixes)]
    return markdown_table(head, [[group, *map(str, row)] for group, row in rows.items()])
