"""What single training images are at risk of: the units that they own, their loss, and whether they came back."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmem.report.page.album import Album, rounded
from fastmem.report.page.story import Story

# rows of the table, and bars of the chart
MOST_ROWS, BARS = 5_000, 40
# images whose pictures come before those of extractions
FIRST = 100


def image_risk(story: Story, album: Album) -> dict[str, Any]:
    """A row for every training image that was attacked or owns a top unit, those at most risk first."""
    manifest, main, owned = story.manifests["train"], story.main, story.owned
    count = len(manifest)
    similarity, hits, tried = np.full(count, np.nan), np.full(count, np.nan), np.zeros(count, bool)
    loss = np.full(count, np.nan)
    losses = story.losses.get("train")
    if losses is not None:
        loss, hits = losses.loss.astype(float), losses.hits.astype(float)
    if main is not None:
        verdicts = main.verdicts["train"]
        place = {image: row for row, image in enumerate(manifest.ids.tolist())}
        at = np.array([place[i] for i in verdicts.ids.tolist()], np.int64)
        similarity[at] = verdicts.similarity[main.longest]
        tried[at] = verdicts.candidate
        hits[at] = np.where(np.isnan(hits[at]), verdicts.score, hits[at])
    known = np.flatnonzero(~np.isnan(similarity) | (owned > 0))
    order = np.lexsort((-owned[known], -np.nan_to_num(similarity[known], nan=-2)))
    rows = known[order][:MOST_ROWS]
    numbers = [album.number(int(i)) for i in manifest.ids[rows]]
    most = np.argsort(-owned, kind="stable")[:BARS]
    most = most[owned[most] > 0]
    bars = [album.number(int(i)) for i in manifest.ids[most]]
    album.show([*bars, *numbers[:FIRST]])
    return {
        "image": numbers,
        "owned": owned[rows].tolist(),
        "hits": rounded(hits[rows]),
        "loss": rounded(loss[rows]),
        "similarity": rounded(similarity[rows]),
        "candidate": tried[rows].astype(int).tolist(),
        "threshold": None if main is None else main.document.threshold,
        "prefix": None if main is None else main.document.prefixes[main.longest],
        "left_out": len(known) - len(rows),
        "images": count,
        "owning": int((owned > 0).sum()),
        "bars": {"image": bars, "owned": owned[most].tolist()},
    }
