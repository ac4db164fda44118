"""The loss and the hits of every single image, from one forward pass over the true tokens of its centre view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmem.files import check_tensors, read_tensors, write_tensors

SCHEMA = "fastmem.image-losses/1"


@dataclass(frozen=True, eq=False)
class ImageLosses:
    """Loss and hits of every image of a set, in manifest order; NaN for images that could not be read.

    Attributes:
        loss: float32 [N], mean loss of the true tokens given the image's class, in nats per token.
        hits: float32 [N] in [0,1], share of the candidate positions at which the model ranks the true token first. This
            is the score by which candidates for extraction are chosen.
        unconditional: float32 [N], the mean loss without a class, in nats per token; None where it was not asked for.
    """

    loss: np.ndarray
    hits: np.ndarray
    unconditional: np.ndarray | None = None

    @classmethod
    def zero(cls, count: int, unconditional: bool) -> ImageLosses:
        """Return NaN for all of ``count`` images; ``unconditional`` says whether to keep the loss without a class."""

        def empty() -> np.ndarray:
            return np.full(count, np.nan, dtype=np.float32)

        return cls(empty(), empty(), empty() if unconditional else None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the arrays as tensors, by name, to be written to a file."""
        named = {"loss": self.loss, "hits": self.hits, "unconditional": self.unconditional}
        return {name: torch.from_numpy(values) for name, values in named.items() if values is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ImageLosses:
        """Make the losses from tensors by name, as the method ``tensors`` returns them."""
        unconditional = tensors.get("unconditional")
        return cls(
            tensors["loss"].numpy(), tensors["hits"].numpy(), None if unconditional is None else unconditional.numpy()
        )

    @property
    def guided(self) -> np.ndarray | None:
        """Loss without a class minus loss with the class, float32 [N]: how much the class helps to predict."""
        return None if self.unconditional is None else self.unconditional - self.loss

    def save(self, path: Path, manifest_hash: str, owner: Mapping[str, str] | None = None) -> None:
        """Write the losses to a safetensors file, with the hash of the manifest that orders the images.

        ``owner`` says which run and set they are of.

        Raises: UsageError where the folder cannot be written.
        """
        write_tensors(path, self.tensors(), SCHEMA, {"manifest": manifest_hash, **(owner or {})})

    @classmethod
    def load(cls, path: Path, manifest_hash: str, owner: Mapping[str, str] | None = None) -> ImageLosses:
        """Read the losses of the images of a manifest, given by its hash, from a safetensors file.

        Raises: InputFileError where the file is missing or damaged, has another format or holds losses of other images.
        """
        tensors, _ = read_tensors(path, SCHEMA, owner={"manifest": manifest_hash, **(owner or {})})
        more = {name: ("float32", ("N",)) for name in tensors.keys() & {"unconditional"}}
        check_tensors(path, tensors, {"loss": ("float32", ("N",)), "hits": ("float32", ("N",)), **more})
        return cls.of(tensors)
