"""Images whose content lies in shards: what sources of tar and parquet files have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from fastmem.data.decoding import DamagedImage, Skipped, decode
from fastmem.data.shards import Pattern, Shards, place_of
from fastmem.data.source import ImageSource, content_hash

# images that are read ahead take at most about this much memory
HELD_BYTES = 256 * 2**20


class ShardedSource(ImageSource):
    """Base class of sources whose images lie in shards, and are read in the order in which they are stored."""

    shards: Shards

    def __init__(
        self,
        pattern: Pattern,
        names: Sequence[str],
        labels: np.ndarray,
        classes: Sequence[str],
        skipped: Sequence[Skipped],
        description: str,
    ) -> None:
        """Keep the list of images.

        Args:
            pattern: names the shards.
            names: ``class/name`` of each image.
            labels: int64 [N], positions in ``classes``.
            classes: class names in label order.
            skipped: files that were found and left out.
            description: a few words that name the source in messages.

        Raises:
            UsageError: two images have the same name.
        """
        self.place = place_of(pattern)
        # content of the images that were read ahead, or what is wrong with them
        self._held: dict[int, bytes | DamagedImage] = {}
        super().__init__(names, labels, classes, skipped, description)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_held": {}}

    def prepare(self, indexes: Sequence[int]) -> None:
        self._held = {}
        size = 0
        for index, content in self._contents(sorted(indexes, key=self._stored_at)):
            self._held[index] = content
            size += len(content) if isinstance(content, bytes) else 0
            if size > HELD_BYTES:
                # the others are read one by one
                return

    def read(self, index: int) -> Image.Image:
        return decode(BytesIO(self._content(index)), str(self.names[index]))

    def digest(self, index: int) -> bytes:
        return content_hash([self._content(index)])

    def _content(self, index: int) -> bytes:
        content = self._held.get(index)
        if content is None:
            ((_, content),) = self._contents([index])
        if isinstance(content, DamagedImage):
            raise DamagedImage(content.reason, content.name)
        return content

    @abstractmethod
    def _stored_at(self, index: int) -> tuple[int, int]:
        """Return the shard of an image, and where it lies there."""

    @abstractmethod
    def _contents(self, indexes: Sequence[int]) -> Iterator[tuple[int, bytes | DamagedImage]]:
        """Yield the content of each of some images, or what is wrong with it, with its position in the source."""


def shards_description(kind: str, shards: Shards) -> str:
    """Return a few words that name the shards in messages."""
    others = f" and {len(shards) - 1} others" if len(shards) > 1 else ""
    return f"{kind} {shards.paths[0]}{others}"
