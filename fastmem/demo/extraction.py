"""What can be pulled out of a tiny model, by how often an image was shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.demo.controls import HELDOUT, dose_groups, place
from fastmem.extraction.extract import Extraction
from fastmem.extraction.verdicts import Count, distinct
from fastmem.report.extraction_report import counts
from fastmem.report.markdown import markdown_table

# more than any class has: everything is tried
ALL_IMAGES = 10_000
ALONE = f"{HELDOUT}, no near-duplicate"
EVERY, EVERY_GROUP = "all training images", "near-duplicates once"


def extraction_by_dose(extraction: Extraction, manifest: Manifest) -> dict[str, list[Count]]:
    """Extracted of the images of each dose, of those with near-duplicates ("twins"), and of held-out images, for every
    prefix.

    manifest: of the training images. Where an index was searched, held-out images without a near-duplicate among the
    training images (by the threshold of the verdicts) are a group too.
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
    """Extracted of all training images, one by one and with near-duplicates counted once, for every prefix."""
    train = extraction.sets["train"]
    groups = len(np.unique(train.groups))
    return {
        EVERY: counts(train, np.ones(len(train.targets), dtype=bool)),
        EVERY_GROUP: [Count(distinct(row, train.groups), groups) for row in train.extracted],
    }


def format_extraction(rows: Mapping[str, Sequence[Count]], prefixes: Sequence[int]) -> str:
    """A Markdown table with a row for every group: k of n and the 95 % interval for each prefix."""
    head = ["shown per epoch", *(f"from {prefix} tokens" for prefix in prefixes)]
    return markdown_table(head, [[group, *map(str, row)] for group, row in rows.items()])
