"""Inputs of the operators, and what their results are held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmem.stats.accumulators import Fold


def make_layer(images: int, positions: int, width: int, units: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs [images,positions,width], weights [units,width] and biases [units] of a layer, float32."""
    generator = torch.Generator().manual_seed(positions * units)
    x = torch.randn(images, positions, width, generator=generator)
    weight = torch.randn(units, width, generator=generator) / width**0.5
    return x, weight, torch.randn(units, generator=generator)


def make_batches(shape: tuple[int, int, int], views: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of few distinct responses, so that equal ones of different images occur, and their ids."""
    generator = torch.Generator().manual_seed(views)
    for images in (5, 1, 3):
        responses = (torch.rand(images, views, *shape, generator=generator) * 6).round() / 7
        yield responses, torch.randperm(1000, generator=generator)[:images] + 2**45


def assert_folds_close(found: Fold, expected: Fold, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    """Equal counts, largest responses and ids; sums within the tolerance."""
    assert found.moments.count == expected.moments.count
    sums = [(fold.moments.mean, fold.moments.m2, fold.view_total) for fold in (found, expected)]
    for mine, theirs in zip(*sums, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
    assert torch.equal(found.largest.value, expected.largest.value)
    assert torch.equal(found.largest.image, expected.largest.image)
