"""Slices of a scoring pass, which the jobs of an array score without a process group and `merge` joins again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """The slice with this ``number``, from 1, of ``of`` slices of a pass.

    Raises: UsageError for numbers that name no slice.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (self.number, self.of))
        if not whole or not 1 <= self.number <= self.of:
            raise _wrong(f"{self.number}/{self.of}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the slice that a text such as "3/8" names. Raises: UsageError for anything else."""
        number, slash, of = text.strip().partition("/")
        if not slash or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (number, of)):
            raise _wrong(text)
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def cut(self, manifests: Mapping[str, Manifest]) -> dict[str, np.ndarray]:
        """Return the positions of this slice's images in the manifest of each set, int64 [n], "train" first.

        A slice holds whole classes, so what is known of a class is known in one slice, and the held-out images of a
        slice are those of its classes. Slices have about equal numbers of training images. A set of which the slice has
        no image is left out.

        Raises: UsageError where there are fewer classes than slices.
        """
        train = manifests["train"]
        edges = np.append(np.unique(train.labels, return_index=True)[1], len(train))
        classes = len(edges) - 1
        if classes < self.of:
            raise UsageError(
                f"expected at most {classes} slices, one for each class of the training images, got {self.of}: choose "
                "fewer with --shard"
            )
        cuts = [0]
        for number in range(1, self.of):
            nearest = int(np.abs(edges - len(train) * number / self.of).argmin())
            # every slice gets a class, and so do those after it
            cuts.append(min(max(nearest, cuts[-1] + 1), classes - (self.of - number)))
        cuts.append(classes)
        labels = np.unique(train.labels)[cuts[self.number - 1] : cuts[self.number]]
        found = {split: np.flatnonzero(np.isin(manifest.labels, labels)) for split, manifest in manifests.items()}
        return {split: positions for split, positions in found.items() if len(positions)}

    def document(self, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
        """Return what a run's identity says of its slice; ``manifests`` are those of all slices together."""
        hashes = {split: manifest.hash for split, manifest in manifests.items()}
        return {"number": self.number, "of": self.of, "manifests": hashes}


def _wrong(got: str) -> UsageError:
    return UsageError(
        f"expected a shard as I/N with I from 1 to N, such as 1/8, got {got!r}: count slices from 1, an array's jobs "
        "with --array=1-N"
    )
