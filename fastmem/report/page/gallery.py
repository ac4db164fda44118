"""What extractions made of every target, for the gallery of the page."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastmem.report.page.album import NONE, Album, rounded
from fastmem.report.page.story import FinishedExtraction, Story


def gallery(story: Story, album: Album, most_decoded: int) -> list[dict[str, Any]]:
    """Every extraction of a run with its targets, and pictures of the most similar completions.

    ``most_decoded`` is how many targets of an extraction, those most like their completions first, have pictures.
    """
    return [_one(story, album, extraction, most_decoded) for extraction in story.extractions]


def _one(story: Story, album: Album, extraction: FinishedExtraction, most_decoded: int) -> dict[str, Any]:
    document = extraction.document
    splits = list(extraction.verdicts)
    parts = [extraction.verdicts[split] for split in splits]

    def along(name: str) -> np.ndarray:
        """A thing of all targets, of all sets."""
        arrays = [getattr(part, name) for part in parts]
        return np.concatenate(arrays, axis=-1)

    images = [album.number(i, split) for split, part in zip(splits, parts, strict=True) for i in part.ids.tolist()]
    similarity = along("similarity")
    first = np.argsort(-similarity[extraction.longest], kind="stable")[:most_decoded]
    nearest = [[album.number(i) if i >= 0 else NONE for i in row] for row in along("nearest").tolist()]
    # the target's and the neighbour's picture of one card, before those of the next
    album.show(n for i in first.tolist() for n in (images[i], nearest[extraction.longest][i]))
    rebuilt, made = _decode(story, album, extraction, splits, first)
    return {
        "name": extraction.name,
        "edit": document.edit,
        "prefixes": document.prefixes,
        "longest": extraction.longest,
        "threshold": document.threshold,
        "embedder": document.embedder,
        "searched": document.index is not None,
        "decoded": extraction.completions is not None,
        "image": images,
        "heldout": int(len(parts[0])) if len(splits) > 1 else len(images),
        "candidate": along("candidate").astype(int).tolist(),
        "ceiling": rounded(along("ceiling"), 3),
        "similarity": rounded(similarity, 4),
        "match": rounded(along("match"), 3),
        "original": rounded(along("original"), 3),
        "nearest": nearest,
        "nearest_similarity": rounded(along("nearest_similarity"), 3),
        "rebuilt": rebuilt,
        "made": made,
    }


def _decode(
    story: Story, album: Album, extraction: FinishedExtraction, splits: list[str], first: np.ndarray
) -> tuple[list[int], list[int]]:
    """Pictures of reconstructions and of completions from the longest prefix, by their numbers, -1 for none."""
    count = sum(len(part) for part in extraction.verdicts.values())
    rebuilt, made = [NONE] * count, [NONE] * count
    if extraction.completions is None or not len(first):
        return rebuilt, made
    kept = [extraction.completions[split] for split in splits]
    true = torch.cat([part.true for part in kept])[first]
    completed = torch.cat([part.made for part in kept], dim=1)[extraction.longest, first]
    # both of one target together, so that room that ends leaves whole cards
    numbers = album.decode(story.model, torch.stack([true, completed], 1).flatten(0, 1))
    for i, (one, other) in zip(first.tolist(), zip(numbers[::2], numbers[1::2], strict=True), strict=True):
        rebuilt[i], made[i] = one, other
    return rebuilt, made
