"""A plan of which part of which segment lies in which tile of rows, so that segment means need no atomics.

Rows are the positions of all images, one image after the other. A segment of an image is cut into pieces at the tile
borders. Each piece is summed by the one program that owns its tile and written to a place of its own, called a slot,
and the slots of a segment are added in the order of the positions. So the same shapes give the same additions on every
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Span = tuple[int, int]


@dataclass(frozen=True)
class SegmentPlan:
    """The pieces in the order of their tiles, and the slots of every segment; int32 tensors on the kernels' device.

    Attributes:
        first: [tiles + 1], the first piece of each tile, and the end.
        low: [pieces], the first row of each piece within its tile.
        high: [pieces], the row after its last one.
        slot: [pieces], where each piece's sum is written.
        slot_first: [images * segments + 1], the first slot of each image's segments, and the end.
        positions: [images * segments], the number of positions of each segment.
    """

    first: Tensor
    low: Tensor
    high: Tensor
    slot: Tensor
    slot_first: Tensor
    positions: Tensor

    @property
    def slots(self) -> int:
        """Number of slots, one for each piece."""
        return len(self.slot)


@lru_cache(maxsize=64)
def plan_segments(
    images: int, positions: int, spans: tuple[Span, ...], tile_rows: int, device: torch.device
) -> SegmentPlan:
    """Cut segments at the borders of tiles.

    Args:
        images: number of images.
        positions: positions of an image.
        spans: segments as pairs (start, stop) of positions, the same for all images; they may overlap.
        tile_rows: rows of a tile.
        device: where the plan's tensors are put.
    """
    start, stop = np.array(spans, dtype=np.int64).T
    image = np.arange(images, dtype=np.int64)[:, None] * positions
    begin, end = (image + start).ravel(), (image + stop).ravel()
    tile_begin = begin // tile_rows
    pieces = (end - 1) // tile_rows + 1 - tile_begin
    slot_first = np.concatenate([[0], pieces.cumsum()])
    owner = np.repeat(np.arange(len(pieces)), pieces)
    slot = np.arange(len(owner))
    tile = tile_begin[owner] + slot - slot_first[owner]
    low = np.maximum(begin[owner] - tile * tile_rows, 0)
    high = np.minimum(end[owner] - tile * tile_rows, tile_rows)
    order = np.argsort(tile, kind="stable")
    tiles = -(-images * positions // tile_rows)
    first = np.searchsorted(tile[order], np.arange(tiles + 1))
    parts: Sequence[np.ndarray] = (first, low[order], high[order], slot[order], slot_first, end - begin)
    return SegmentPlan(*(torch.from_numpy(part.astype(np.int32)).to(device) for part in parts))
