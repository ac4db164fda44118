"""What is kept of every single image when asked: three numbers from the teacher-forced pass over its centre view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmem.errors import InputFileError
from fastmem.files import read_tensors, write_tensors

SCHEMA = "fastmem.image-losses/1"


@dataclass(frozen=True, eq=False)
class ImageLosses:
    """Loss and hits of every image of a set, in manifest order, float32 [N]; NaN for images that could not be read.

    loss: mean loss of the true tokens under the image's class, nats per token; unconditional: the same without a class,
    None where it was not asked for; hits: share of hits over the candidate positions, the candidate score.
    """

    loss: np.ndarray
    hits: np.ndarray
    unconditional: np.ndarray | None = None

    @classmethod
    def zero(cls, count: int, unconditional: bool) -> ImageLosses:
        def empty() -> np.ndarray:
            return np.full(count, np.nan, dtype=np.float32)

        return cls(empty(), empty(), empty() if unconditional else None)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name, for a file."""
        named = {"loss": self.loss, "hits": self.hits, "unconditional": self.unconditional}
        return {name: torch.from_numpy(values) for name, values in named.items() if values is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ImageLosses:
        """What ``tensors`` gave."""
        loss, hits, unconditional = (tensors.get(name) for name in ("loss", "hits", "unconditional"))
        return cls(loss.numpy(), hits.numpy(), None if unconditional is None else unconditional.numpy())

    @property
    def guided(self) -> np.ndarray | None:
        """Unconditional minus conditional loss, float32 [N]: what the class label tells the model about the image."""
        return None if self.unconditional is None else self.unconditional - self.loss

    def save(self, path: Path, manifest_hash: str) -> None:
        """Write a safetensors file. Raises: UsageError where the place cannot be written."""
        write_tensors(path, self.tensors(), SCHEMA, {"manifest": manifest_hash})

    @classmethod
    def load(cls, path: Path, manifest_hash: str) -> ImageLosses:
        """Read what ``save`` wrote.

        Raises: InputFileError for a missing, damaged or foreign file, or one of other images.
        """
        tensors, header = read_tensors(path, SCHEMA)
        if header["manifest"] != manifest_hash:
            raise InputFileError(
                f"expected losses of the manifest {manifest_hash[:12]} in {path}, got {header['manifest'][:12]}: was "
                "the file copied from another run?"
            )
        return cls.of(tensors)
