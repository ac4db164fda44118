"""The largest responses of two sets together are those of all their responses sorted."""

from __future__ import annotations

import pytest
import torch

from fastmem.stats.accumulators import Largest

UNITS = (2, 1, 300)


def seen(count: int, first: int, scale: float, k: int) -> Largest:
    """The largest of ``count`` responses of every unit, many of them equal, and ids from ``first`` on in any order."""
    generator = torch.Generator().manual_seed(first + count)
    values = (torch.rand(*UNITS, count, generator=generator) * 20).round() / 20 * scale
    ids = first + torch.stack([torch.randperm(count, generator=generator) for _ in range(UNITS[-1])])
    return Largest.zero(UNITS, k)._chosen(values, ids.expand(values.shape))


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.3], ids=["as large", "a little smaller", "small"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0), (2, 9), (9, 2), (9, 9)])
@pytest.mark.parametrize("k", [1, 3, 4, 8])
def test_merging_keeps_what_sorting_all_would(k, counts, scale):
    one, two = seen(counts[0], 0, 1.0, k), seen(counts[1], 100, scale, k)
    merged, sorted_ = one.merge(two), one._chosen(two.value, two.image)
    assert torch.equal(merged.value, sorted_.value)
    assert torch.equal(merged.image, sorted_.image)
