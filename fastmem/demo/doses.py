"""Graded doses: which embedded training images the tiny models saw more often than the rest.

Dosed images are drawn among those without a near-duplicate in the training set, so that a dose means what it says;
images *with* one are a group of their own ("twins").
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

IMAGES = Path(__file__).parent / "emoji64.zip"
DOSES = (2, 4, 8, 16)
GROUP_SIZE = 48


def twins() -> frozenset[str]:
    """Names CLASS/FILE of embedded pictures that have a near-duplicate (SSCD cosine above 0.65)."""
    with zipfile.ZipFile(IMAGES) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("twins.csv").decode()))
        return frozenset(f"{row['class']}/{row['file']}" for row in rows)


def draw_doses(names: Sequence[str], seed: int) -> dict[str, int]:
    """How often each training image is shown per epoch: GROUP_SIZE images for each of DOSES, one for all others.

    names: CLASS/FILE of the training images, in any order.
    """
    known_twins = twins()
    free = np.array(sorted(n for n in names if n not in known_twins))
    chosen = np.random.default_rng(seed).permutation(free)[: GROUP_SIZE * len(DOSES)]
    doses = dict.fromkeys(sorted(names), 1)
    for i, dose in enumerate(DOSES):
        doses.update(dict.fromkeys(chosen[i * GROUP_SIZE : (i + 1) * GROUP_SIZE].tolist(), dose))
    return doses


def groups(doses: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the training images by group: "1", "2", "4", "8", "16" and "twins" (shown once, near-duplicates)."""
    known_twins = twins()
    out: dict[str, list[str]] = {str(dose): [] for dose in (1, *DOSES)} | {"twins": []}
    for name, dose in doses.items():
        out["twins" if name in known_twins else str(dose)].append(name)
    return out
