"""What all image sources have in common: names, labels, stable ids, and how one image is read by its position."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from fastmem.data.decoding import Skipped
from fastmem.errors import UsageError

# length of the hash of an image's content
DIGEST_BYTES = 16
# words in place of a path, for images that come with the package and for images that exist in memory only
EMBEDDED, IN_MEMORY = "embedded", "memory"


def content_hash(parts: Iterable[bytes]) -> bytes:
    """Return a hash, 16 bytes, of an image's content, given in parts."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def image_ids(names: Iterable[str]) -> np.ndarray:
    """Return the stable ids of images from their names ``class/name``: int64 [N] in [0, 2**63)."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    ids: np.ndarray = np.frombuffer(digests, dtype=">u8") & np.uint64(2**63 - 1)
    return ids.astype(np.int64)


class ImageSource(ABC):
    """Base class of image sources: images with ids and labels, read by position.

    A source can be pickled, so that worker processes can read its images.

    Attributes:
        ids: int64 [N] in [0, 2**63), different for every image.
        labels: int64 [N], positions in ``classes``.
        names: strings [N], ``class/name``.
        classes: class names in label order; a class may have no images.
        skipped: files that were found and left out.
        description: a few words that name the source in messages.
        place: absolute path from which ``open_source`` reads the same images again, or ``EMBEDDED`` or ``IN_MEMORY``.
        split: the split to give ``open_source`` together with that path.
    """

    place: str = IN_MEMORY
    split: str | None = None

    def __init__(
        self,
        names: Sequence[str],
        labels: np.ndarray,
        classes: Sequence[str],
        skipped: Sequence[Skipped],
        description: str,
        ids: np.ndarray | None = None,
    ) -> None:
        """Keep the list of images, and check that their ids differ.

        Args:
            names: ``class/name`` of each image.
            labels: int64 [N], positions in ``classes``.
            classes: class names in label order.
            skipped: files that were found and left out.
            description: a few words that name the source in messages.
            ids: int64 [N], image ids; None for hashes of the names.

        Raises:
            UsageError: two images have the same id.
        """
        self.ids = image_ids(names) if ids is None else ids
        self.labels = labels
        # a single block of memory: of a million string objects, every forked worker would come to hold a copy
        self.names = np.array(names, dtype=np.dtypes.StringDType())
        self.classes = tuple(classes)
        self.skipped = list(skipped)
        self.description = description
        self._by_id = np.argsort(self.ids, kind="stable")
        ordered = self.ids[self._by_id]
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(twice):
            first, second = (self.names[self._by_id[twice[0] + step]] for step in (0, 1))
            raise UsageError(
                f"expected a different id for every image in {description}, got id {ordered[twice[0]]} for both "
                f"{first!r} and {second!r}; rename or remove one of them"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def index_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the positions, int64 [M], of the images with ids int64 [M].

        Raises:
            UsageError: the source has no image with one of the ids.
        """
        ids = np.asarray(ids, dtype=np.int64)
        where = np.searchsorted(self.ids, ids, sorter=self._by_id)
        index = self._by_id[np.minimum(where, len(self) - 1)]
        unknown = np.flatnonzero(self.ids[index] != ids)
        if len(unknown):
            raise UsageError(
                f"expected ids of images in {self.description}, got {len(unknown)} that are not there, the first "
                f"{ids[unknown[0]]}; use the images that the ids were made from"
            )
        return index

    def name(self, image_id: int) -> str:
        """Return the name, ``class/name``, of the image with an id.

        Raises:
            UsageError: the source has no image with that id.
        """
        return str(self.names[self.index_of(np.array([image_id]))[0]])

    def prepare(self, indexes: Sequence[int]) -> None:  # noqa: B027 - a source that gains nothing by it does nothing
        """Say which images, by their positions, are read next, so that their files can be read in stored order."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Return the image at position ``index`` as an RGB picture.

        Raises:
            DamagedImage: the file is missing, damaged or above a limit.
        """

    def digest(self, index: int) -> bytes:
        """Return a hash, 16 bytes, of the content of the image at position ``index``, to notice when it changes.

        This method hashes the pixels; sources that read files hash the bytes of the file.

        Raises:
            DamagedImage: the image cannot be read.
        """
        image = self.read(index)
        return content_hash([repr(image.size).encode(), image.tobytes()])
