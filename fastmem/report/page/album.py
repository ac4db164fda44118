"""The images that a page names, each once, with small pictures of them while these fit into the page."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastmem.data.decoding import DamagedImage
from fastmem.data.token_source import NoPixels
from fastmem.models.model import Model
from fastmem.quality.features import to_bytes
from fastmem.report.page.story import Story
from fastmem.reporter import printable

# longest side of a picture, in pixels, and its quality as WebP
SIDE, QUALITY = 96, 78
# bytes of all pictures together
MOST_BYTES = 9 * 2**20
# completions that are decoded at once
BATCH = 32
# stands for no image and for no picture
NONE = -1


class Album:
    """Images get a number when they are first named; pictures are added in order until they no longer fit."""

    def __init__(self, story: Story, with_pictures: bool, most_bytes: int = MOST_BYTES) -> None:
        """Start an empty album of a run's images.

        Args:
            story: the run.
            with_pictures: whether any picture is added.
            most_bytes: how many bytes of pictures fit.
        """
        self._manifests = story.manifests
        self._sources = story.sources
        self._with_pictures = with_pictures
        self._left = most_bytes if with_pictures else 0
        self._numbers: dict[tuple[str, int], int] = {}
        self._rows = {
            split: dict(zip(manifest.ids.tolist(), range(len(manifest)), strict=True))
            for split, manifest in story.manifests.items()
        }
        self._named: list[tuple[str, int]] = []
        self._of_image: dict[int, int] = {}
        self._decoded: dict[bytes, int] = {}
        self._pictures: list[str] = []
        self.left_out = 0

    def number(self, image_id: int, split: str = "train") -> int:
        """Number of an image of a set; -1 for an id that the set does not have."""
        row = self._rows[split].get(image_id)
        if row is None:
            return NONE
        key = split, row
        if key not in self._numbers:
            self._numbers[key] = len(self._named)
            self._named.append(key)
        return self._numbers[key]

    def show(self, numbers: Iterable[int]) -> None:
        """Add pictures of numbered images, where there is room; damaged files are left without one."""
        for number in numbers:
            if number == NONE or number in self._of_image:
                continue
            if not self._left:
                self.left_out += self._with_pictures
                continue
            split, row = self._named[number]
            source, manifest = self._sources[split], self._manifests[split]
            try:
                picture = source.read(int(manifest.index[row]))
            except (DamagedImage, NoPixels):
                # its file has changed since it was scored, or the set holds tokens alone
                self._of_image[number] = NONE
                continue
            self._of_image[number] = self._add(picture)

    def decode(self, model: Model, tokens: torch.Tensor) -> list[int]:
        """Add pictures that a model decodes from tokens, int64 [N,T]; returns their numbers, -1 where none fits.

        Equal tokens, such as those that an edit has not changed, share a picture.
        """
        keys = [row.tobytes() for row in tokens.numpy()]
        new = {key: row for row, key in enumerate(keys) if key not in self._decoded}
        for batch in torch.tensor(list(new.values()), dtype=torch.int64).split(BATCH):
            if not self._left:
                self.left_out += len(batch) * self._with_pictures
                continue
            for row, pixels in zip(batch.tolist(), to_bytes(model.decode(tokens[batch])), strict=True):
                self._decoded[keys[row]] = self._add(Image.fromarray(pixels))
        return [self._decoded.get(key, NONE) for key in keys]

    def document(self) -> dict[str, Any]:
        """Names, classes, sets and pictures of all images that were numbered, for the page."""
        classes = self._manifests["train"].classes
        names, labels = [], []
        for split, row in self._named:
            manifest = self._manifests[split]
            names.append(printable(str(manifest.names[row])))
            labels.append(int(manifest.labels[row]))
        return {
            "names": names,
            "labels": labels,
            "heldout": [number for number, (split, _) in enumerate(self._named) if split != "train"],
            "classes": [printable(name) for name in classes],
            "picture": [self._of_image.get(number, NONE) for number in range(len(names))],
            "pictures": self._pictures,
        }

    def _add(self, picture: Image.Image) -> int:
        picture.thumbnail((SIDE, SIDE))
        buffer = BytesIO()
        picture.save(buffer, "WEBP", quality=QUALITY, method=4)
        content = buffer.getvalue()
        if len(content) > self._left:
            # all later ones are left out, too, so that those that are there are the first ones
            self._left = 0
            self.left_out += 1
            return NONE
        self._left -= len(content)
        self._pictures.append(base64.b64encode(content).decode())
        return len(self._pictures) - 1


def rounded(values: np.ndarray, digits: int = 4) -> list[Any]:
    """Numbers as JSON has them, with None for NaN and infinity."""
    return [_rounded(v, digits) for v in values.tolist()]


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_rounded(v, digits) for v in value]
    return round(value, digits) if math.isfinite(value) else None


def in_bytes(values: np.ndarray, low: float, high: float) -> str:
    """Numbers as one byte each, in base64: 0 stands for ``low``, 255 for ``high``."""
    scaled = (values - low) / ((high - low) or 1) * 255
    return base64.b64encode(np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8).tobytes()).decode()
