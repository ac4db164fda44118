"""The running sums behind the statistics of unit responses.

Each kind starts empty with ``zero``, takes more data with ``update`` and joins two sums with ``merge``. These leave the
old value as it was and return a new one; only ``Fold.update_by`` works in place.

Source of the scores: arXiv 2409.19069 (UnitMem), arXiv 2509.00488 (UnitMem of image autoregressive models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmem.backends.select import UnitUpdate

LARGEST = 4
# the names of their tensors in files, with the dtypes
ROW_TENSORS = {"mean": "float64", "m2": "float64", "largest": "float32", "image": "int64"}
SUMMARY_TENSORS = {"total": "float64", "largest": "float64", "within": "float64", "within_image": "int64"}
FOLD_TENSORS = {"mean": "float64", "m2": "float64", "view": "float64", "top_value": "float32", "top_image": "int64"}

Shape = tuple[int, int, int]


def contrast(largest: Tensor, total: Tensor, count: int) -> Tensor:
    """How far the largest of some values stands out: (largest - rest) / (largest + rest), float64 in [0,1].

    ``rest`` is the mean of all values but the largest. The result is 0 where both are 0 and where ``count`` is below 2.

    Args:
        largest: the largest value, any floating dtype and shape, not negative.
        total: the sum of all values, of the same shape.
        count: how many values there are.
    """
    largest, total = largest.double(), total.double()
    if count < 2:
        return torch.zeros_like(total)
    rest = ((total - largest) / (count - 1)).clamp_min(0)
    both = largest + rest
    return torch.where(both > 0, ((largest - rest) / both).clamp(0, 1), 0.0)


@dataclass
class Moments:
    """How many images were seen, with the mean and the spread of their responses.

    Attributes:
        count: number of images.
        mean: mean response, float64 [layers,segments,units].
        m2: sum of squared deviations from the mean, float64 [layers,segments,units].
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def zero(cls, shape: Shape, device: torch.device | str = "cpu") -> Moments:
        """The moments of no images."""
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)))

    @classmethod
    def of(cls, responses: Tensor) -> Moments:
        """The moments of one batch of responses, float32 [n,layers,segments,units]."""
        values = responses.double()
        mean = values.mean(0)
        return cls(len(values), mean, (values - mean).square_().sum(0))

    def merge(self, other: Moments) -> Moments:
        """The moments of two sets of images together, by Chan's formula for merging them."""
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
        """Population variance of the responses, float64 [layers,segments,units]; 0 without images."""
        return self.m2 / max(1, self.count)

    def to(self, device: torch.device | str) -> Moments:
        """The same moments with their tensors on ``device``."""
        return Moments(self.count, self.mean.to(device), self.m2.to(device))


@dataclass
class Largest:
    """The k largest responses of every unit, and which images gave them.

    The largest stands first; among equal responses the smallest image id does.

    Attributes:
        value: responses, float32 [layers,segments,units,k]; an empty place holds -inf.
        image: ids of the images they belong to, int64 [layers,segments,units,k]; an empty place holds -1.
    """

    value: Tensor
    image: Tensor

    @classmethod
    def zero(cls, shape: Shape, k: int = LARGEST, device: torch.device | str = "cpu") -> Largest:
        """``k`` empty places for every unit."""
        return cls(
            torch.full((*shape, k), -torch.inf, dtype=torch.float32, device=device),
            torch.full((*shape, k), -1, dtype=torch.int64, device=device),
        )

    def update(self, responses: Tensor, image_ids: Tensor) -> Largest:
        """The largest responses after one more batch.

        Args:
            responses: float32 [n,layers,segments,units].
            image_ids: int64 [n].
        """
        values = responses.movedim(0, -1)
        return self._chosen(values, image_ids.to(values.device).expand(values.shape))

    def _chosen(self, values: Tensor, images: Tensor) -> Largest:
        """The k largest of these and of others in any order, float32 and int64 [layers,segments,units,n]."""
        value = torch.cat([self.value, values], -1)
        image = torch.cat([self.image, images], -1)
        # two stable sorts order by value, then by id
        by_id = image.argsort(dim=-1, stable=True)
        value, image = value.gather(-1, by_id), image.gather(-1, by_id)
        by_value = value.argsort(dim=-1, descending=True, stable=True)[..., : self.value.shape[-1]]
        return Largest(value.gather(-1, by_value), image.gather(-1, by_value))

    def merge(self, other: Largest) -> Largest:
        """The k largest responses of two sets of images together."""
        k = self.value.shape[-1]
        if other.value.shape[-1] != k or k & (k - 1):
            return self._chosen(other.value, other.image)
        # after many images, few units find a response among the largest that is not there already
        changed = (other.value[..., 0] >= self.value[..., -1]).flatten().nonzero()[:, 0]
        if len(changed) > self.value[..., 0].numel() // 4:
            return self._merge_sorted(other)
        value, image = self.value.flatten(0, -2).clone(), self.image.flatten(0, -2).clone()
        theirs = Largest(other.value.flatten(0, -2)[changed], other.image.flatten(0, -2)[changed])
        merged = Largest(value[changed], image[changed])._merge_sorted(theirs)
        value[changed], image[changed] = merged.value, merged.image
        return Largest(value.view(self.value.shape), image.view(self.image.shape))

    def _merge_sorted(self, other: Largest) -> Largest:
        k = self.value.shape[-1]
        # both are sorted: the larger of each and its opposite are the k largest, first falling and then rising, which a
        # bitonic network sorts many times as fast as a sort does
        mine = list(zip(self.value.unbind(-1), self.image.unbind(-1), strict=True))
        theirs = list(zip(other.value.unbind(-1), other.image.unbind(-1), strict=True))
        rows = [_in_order(one, two)[0] for one, two in zip(mine, reversed(theirs), strict=True)]
        gap = k // 2
        while gap:
            for low in (i for i in range(k) if not i & gap):
                rows[low], rows[low + gap] = _in_order(rows[low], rows[low + gap])
            gap //= 2
        return Largest(torch.stack([value for value, _ in rows], -1), torch.stack([image for _, image in rows], -1))


# responses and the images that gave them
Pair = tuple[Tensor, Tensor]


def _in_order(one: Pair, two: Pair) -> tuple[Pair, Pair]:
    """At each place the larger response first, and of equal ones that of the smaller image id."""
    swapped = (two[0] > one[0]) | ((two[0] == one[0]) & (two[1] < one[1]))
    first = torch.where(swapped, two[0], one[0]), torch.where(swapped, two[1], one[1])
    second = torch.where(swapped, one[0], two[0]), torch.where(swapped, one[1], two[1])
    return first, second


@dataclass
class ClassRow:
    """What is kept of the images of one class.

    Attributes:
        moments: count, mean and spread of the responses.
        largest: largest response, float32 [layers,segments,units]; 0 without images.
        image: id of the image that gave it, int64 [layers,segments,units]; the smallest id among equal responses, -1
            without images.
    """

    moments: Moments
    largest: Tensor
    image: Tensor

    @classmethod
    def zero(cls, shape: Shape, device: torch.device | str = "cpu") -> ClassRow:
        """The row of a class without images."""
        largest = torch.zeros(shape, dtype=torch.float32, device=device)
        return cls(Moments.zero(shape, device), largest, torch.full(shape, -1, dtype=torch.int64, device=device))

    def merge(self, other: ClassRow) -> ClassRow:
        """The row of two sets of images of one class together."""
        largest, image = _larger(self.largest, self.image, other.largest, other.image)
        return ClassRow(self.moments.merge(other.moments), largest, image)

    def to(self, device: torch.device | str) -> ClassRow:
        """The same row with its tensors on ``device``."""
        return ClassRow(self.moments.to(device), self.largest.to(device), self.image.to(device))

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of the row for a file, named with ``prefix`` in front; the count is not among them."""
        values = (self.moments.mean, self.moments.m2, self.largest, self.image)
        return {prefix + name: value for name, value in zip(ROW_TENSORS, values, strict=True)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], count: int, prefix: str = "") -> ClassRow:
        """The row of ``count`` images from the tensors that ``to_tensors`` gave under the same ``prefix``."""
        mean, m2, largest, image = (tensors[prefix + name] for name in ROW_TENSORS)
        return cls(Moments(count, mean, m2), largest, image)


@dataclass
class ClassSummary:
    """What the class-level scores need to know of the classes whose images have all been seen.

    Attributes:
        count: number of classes.
        total: sum of the mean responses of the classes, float64 [layers,segments,units].
        largest: largest of these means, float64 [layers,segments,units].
        within: largest UnitMem among the images of one class, float64 [layers,segments,units].
        within_image: id of the image it belongs to, int64 [layers,segments,units]; -1 without classes.
    """

    count: int
    total: Tensor
    largest: Tensor
    within: Tensor
    within_image: Tensor

    @classmethod
    def zero(cls, shape: Shape, device: torch.device | str = "cpu") -> ClassSummary:
        """The summary of no classes."""
        total, largest, within = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))
        return cls(0, total, largest, within, torch.full(shape, -1, dtype=torch.int64, device=device))

    def update(self, row: ClassRow) -> ClassSummary:
        """The summary after one more class, given the row of all its images; a class without images is left out."""
        m = row.moments
        if not m.count:
            return self
        within = contrast(row.largest, m.mean * m.count, m.count)
        return self.merge(ClassSummary(1, m.mean, m.mean, within, row.image))

    def merge(self, other: ClassSummary) -> ClassSummary:
        """The summary of two sets of classes together, which must have no class in common."""
        return ClassSummary(
            self.count + other.count,
            self.total + other.total,
            torch.maximum(self.largest, other.largest),
            *_larger(self.within, self.within_image, other.within, other.within_image),
        )

    def to(self, device: torch.device | str) -> ClassSummary:
        """The same summary with its tensors on ``device``."""
        return ClassSummary(self.count, *(tensor.to(device) for tensor in self.to_tensors().values()))

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of the summary for a file, named with ``prefix`` in front; the count is not among them."""
        return {prefix + name: getattr(self, name) for name in SUMMARY_TENSORS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], count: int, prefix: str = "") -> ClassSummary:
        """The summary of ``count`` classes from the tensors that ``to_tensors`` gave under the same ``prefix``."""
        return cls(count, *(tensors[prefix + name] for name in SUMMARY_TENSORS))


def _larger(value: Tensor, image: Tensor, other: Tensor, other_image: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two values at each place, with its image id; of equal values the smaller id, where -1 is none."""
    sooner = (other_image >= 0) & ((image < 0) | (other_image < image))
    theirs = (other > value) | ((other == value) & sooner)
    return torch.where(theirs, other, value), torch.where(theirs, other_image, image)


@dataclass
class Fold:
    """What is kept of one part of the images.

    Attributes:
        moments: count, mean and spread of the responses of the images, each being the mean over its views.
        view_total: sum over the images of the variance over an image's views, float64 [layers,segments,units].
        largest: the largest responses and their images.
    """

    moments: Moments
    view_total: Tensor
    largest: Largest

    @classmethod
    def zero(cls, shape: Shape, k: int = LARGEST, device: torch.device | str = "cpu") -> Fold:
        """The state before any image, which will keep the ``k`` largest responses."""
        view_total = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(Moments.zero(shape, device), view_total, Largest.zero(shape, k, device))

    def update(self, responses: Tensor, image_ids: Tensor) -> Fold:
        """The state after one more batch.

        Args:
            responses: float32 [n,views,layers,segments,units].
            image_ids: int64 [n].
        """
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
        """The state after one more batch, taken by a backend's faster code, which changes this fold's own tensors.

        Args:
            kernel: the backend's code; None does what ``update`` does.
            responses: float32 [n,views,layers,segments,units].
            image_ids: int64 [n].
        """
        if kernel is None:
            return self.update(responses, image_ids)
        m, top = self.moments, self.largest
        ids = image_ids.to(responses.device)
        kernel(m.mean, m.m2, self.view_total, top.value, top.image, m.count, responses, ids)
        m.count += len(responses)
        return self

    def merge(self, other: Fold) -> Fold:
        """The state of two sets of images together, which must have no image in common."""
        return Fold(
            self.moments.merge(other.moments),
            self.view_total + other.view_total,
            self.largest.merge(other.largest),
        )

    def to_row(self) -> ClassRow:
        """The class row of these images, which must all be of one class."""
        return ClassRow(self.moments, self.largest.value[..., 0].clamp_min(0), self.largest.image[..., 0])

    def to(self, device: torch.device | str) -> Fold:
        """The same state with its tensors on ``device``."""
        largest = Largest(self.largest.value.to(device), self.largest.image.to(device))
        return Fold(self.moments.to(device), self.view_total.to(device), largest)

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of the state for a file, named with ``prefix`` in front; the count is not among them."""
        values = (self.moments.mean, self.moments.m2, self.view_total, self.largest.value, self.largest.image)
        return {prefix + name: value for name, value in zip(FOLD_TENSORS, values, strict=True)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], count: int, prefix: str = "") -> Fold:
        """The state of ``count`` images from the tensors that ``to_tensors`` gave under the same ``prefix``."""
        mean, m2, view_total, value, image = (tensors[prefix + name] for name in FOLD_TENSORS)
        return cls(Moments(count, mean, m2), view_total, Largest(value, image))
