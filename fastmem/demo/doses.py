"""Doses: how many times per epoch each training image in the package was shown to the tiny models.

Images with a near-duplicate in the training set are in effect shown more often than their dose says. They therefore
always have the dose 1, and are a group of their own, "twins".
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

IMAGES = Path(__file__).parent / "emoji64.zip"
# the doses above 1, and the number of images of each
DOSES = (2, 4, 8, 16)
GROUP_SIZE = 48


def twins() -> frozenset[str]:
    """Return the names ``class/file`` of images in the package that have a near-duplicate (SSCD cosine above 0.65)."""
    with zipfile.ZipFile(IMAGES) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("twins.csv").decode()))
        return frozenset(f"{row['class']}/{row['file']}" for row in rows)


def draw_doses(names: Sequence[str], seed: int) -> dict[str, int]:
    """Return the dose of each training image by name: ``GROUP_SIZE`` random images for each of ``DOSES``, else 1.

    ``names`` are ``class/file`` of the training images, in any order; ``seed`` determines the random choice.
    """
    known_twins = twins()
    free = np.array(sorted(n for n in names if n not in known_twins))
    chosen = np.random.default_rng(seed).permutation(free)[: GROUP_SIZE * len(DOSES)]
    doses = dict.fromkeys(sorted(names), 1)
    for i, dose in enumerate(DOSES):
        doses.update(dict.fromkeys(chosen[i * GROUP_SIZE : (i + 1) * GROUP_SIZE].tolist(), dose))
    return doses


def groups(doses: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the names of the training images by group: "1", "2", "4", "8" and "16" by dose, and "twins".

    ``doses`` are the doses by name; "twins" are the images with a near-duplicate, whose dose is 1.
    """
    known_twins = twins()
    out: dict[str, list[str]] = {group: [] for group in (*map(str, (1, *DOSES)), "twins")}
    for name, dose in doses.items():
        out["twins" if name in known_twins else str(dose)].append(name)
    return out
