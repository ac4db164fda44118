"""The running sums behind the statistics: pure values with zero, update and merge.

Source of the scores: arXiv 2409.19069 (UnitMem), arXiv 2509.00488 (UnitMem of image autoregressive models).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmem.backends.select import UnitUpdate

LARGEST = 4
Shape = tuple[int, int, int]


def contrast(largest: Tensor, total: Tensor, count: int) -> Tensor:
    """(max - rest) / (max + rest), rest being the mean of all but the largest: float64, in [0,1].

    largest: the largest of ``count`` values; total: their sum. 0 where both are 0, and where there is no rest.
    """
    largest, total = largest.double(), total.double()
    if count < 2:
        return torch.zeros_like(total)
    rest = ((total - largest) / (count - 1)).clamp_min(0)
    both = largest + rest
    return torch.where(both > 0, ((largest - rest) / both).clamp(0, 1), 0.0)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations (m2) of responses; tensors float64 [layers,segments,units]."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def zero(cls, shape: Shape, device: torch.device | str = "cpu") -> Moments:
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)))

    @classmethod
    def of(cls, responses: Tensor) -> Moments:
        """Moments of one batch of responses float32 [n,layers,segments,units]."""
        values = responses.double()
        mean = values.mean(0)
        return cls(len(values), mean, (values - mean).square_().sum(0))

    def merge(self, other: Moments) -> Moments:
        """Chan's merge: the moments of both sets together."""
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square_() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> Tensor:
        """Population variance."""
        return self.m2 / max(1, self.count)


@dataclass
class Largest:
    """The k largest responses of every unit and their image ids, [layers,segments,units,k], best first.

    Among equal responses the smallest image id stands first. Empty places hold -inf and -1.
    """

    value: Tensor
    image: Tensor

    @classmethod
    def zero(cls, shape: Shape, k: int = LARGEST, device: torch.device | str = "cpu") -> Largest:
        return cls(
            torch.full((*shape, k), -torch.inf, dtype=torch.float32, device=device),
            torch.full((*shape, k), -1, dtype=torch.int64, device=device),
        )

    def update(self, responses: Tensor, image_ids: Tensor) -> Largest:
        """With the responses float32 [n,layers,segments,units] of the images int64 [n]."""
        values = responses.movedim(0, -1)
        return self.merge(Largest(values, image_ids.to(values.device).expand(values.shape)))

    def merge(self, other: Largest) -> Largest:
        """The k largest of both."""
        value = torch.cat([self.value, other.value], -1)
        image = torch.cat([self.image, other.image], -1)
        # two stable sorts order by value, then by id
        by_id = image.argsort(dim=-1, stable=True)
        value, image = value.gather(-1, by_id), image.gather(-1, by_id)
        by_value = value.argsort(dim=-1, descending=True, stable=True)[..., : self.value.shape[-1]]
        return Largest(value.gather(-1, by_value), image.gather(-1, by_value))


@dataclass
class ClassRow:
    """One class's moments and its largest response: float32 with the image id int64, [layers,segments,units].

    Without an image the response is 0 and the id -1; among equal responses the smallest id counts.
    """

    moments: Moments
    largest: Tensor
    image: Tensor

    @classmethod
    def zero(cls, shape: Shape, device: torch.device | str = "cpu") -> ClassRow:
        largest = torch.zeros(shape, dtype=torch.float32, device=device)
        return cls(Moments.zero(shape, device), largest, torch.full(shape, -1, dtype=torch.int64, device=device))

    def merge(self, other: ClassRow) -> ClassRow:
        largest, image = _larger(self.largest, self.image, other.largest, other.image)
        return ClassRow(self.moments.merge(other.moments), largest, image)

    def to(self, device: torch.device | str) -> ClassRow:
        m = self.moments
        moments = Moments(m.count, m.mean.to(device), m.m2.to(device))
        return ClassRow(moments, self.largest.to(device), self.image.to(device))


@dataclass
class ClassSummary:
    """What the class-level scores need of the classes seen whole, each tensor [layers,segments,units].

    count: classes; total, largest: sum and largest of the class means, float64; within: largest within-class UnitMem,
    float64; within_image: id of the image it belongs to, int64, -1 without a class.
    """

    count: int
    total: Tensor
    largest: Tensor
    within: Tensor
    within_image: Tensor

    @classmethod
    def zero(cls, shape: Shape, device: torch.device | str = "cpu") -> ClassSummary:
        zeros = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))
        return cls(0, *zeros, torch.full(shape, -1, dtype=torch.int64, device=device))

    def update(self, row: ClassRow) -> ClassSummary:
        """With a class that is complete; a class without images changes nothing."""
        m = row.moments
        if not m.count:
            return self
        within = contrast(row.largest, m.mean * m.count, m.count)
        return self.merge(ClassSummary(1, m.mean, m.mean, within, row.image))

    def merge(self, other: ClassSummary) -> ClassSummary:
        """Of two sets of *different* classes."""
        return ClassSummary(
            self.count + other.count,
            self.total + other.total,
            torch.maximum(self.largest, other.largest),
            *_larger(self.within, self.within_image, other.within, other.within_image),
        )


def _larger(value: Tensor, image: Tensor, other: Tensor, other_image: Tensor) -> tuple[Tensor, Tensor]:
    """Elementwise the larger value with its image id; among equal values the smallest id, -1 being none."""
    sooner = (other_image >= 0) & ((image < 0) | (other_image < image))
    theirs = (other > value) | ((other == value) & sooner)
    return torch.where(theirs, other, value), torch.where(theirs, other_image, image)


@dataclass
class Fold:
    """Running state of the images of one fold: moments, sum of within-image variances over views, largest responses."""

    moments: Moments
    view_total: Tensor
    largest: Largest

    @classmethod
    def zero(cls, shape: Shape, k: int = LARGEST, device: torch.device | str = "cpu") -> Fold:
        view_total = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(Moments.zero(shape, device), view_total, Largest.zero(shape, k, device))

    def update(self, responses: Tensor, image_ids: Tensor) -> Fold:
        """With the responses float32 [n,views,layers,segments,units] of the images int64 [n]."""
        per_view = responses.double()
        # rounded once: every statistic sees the same float32 response of an image
        per_image = per_view.mean(1).float()
        spread = per_view.var(1, correction=0).sum(0)
        return Fold(
            self.moments.merge(Moments.of(per_image)),
            self.view_total + spread,
            self.largest.update(per_image, image_ids),
        )

    def update_by(self, kernel: UnitUpdate | None, responses: Tensor, image_ids: Tensor) -> Fold:
        """As ``update``, by a backend's kernel that works in place on this fold's own tensors; None runs ``update``."""
        if kernel is None:
            return self.update(responses, image_ids)
        m, top = self.moments, self.largest
        ids = image_ids.to(responses.device)
        kernel(m.mean, m.m2, self.view_total, top.value, top.image, m.count, responses, ids)
        m.count += len(responses)
        return self

    def merge(self, other: Fold) -> Fold:
        return Fold(
            self.moments.merge(other.moments),
            self.view_total + other.view_total,
            self.largest.merge(other.largest),
        )

    def to_row(self) -> ClassRow:
        """The class row of a fold whose images are all of one class."""
        return ClassRow(self.moments, self.largest.value[..., 0].clamp_min(0), self.largest.image[..., 0])
