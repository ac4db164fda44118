"""Samples in shards that are functions of weights, seed and number, so that a killed run goes on anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.files import read_json, read_tensors, write_atomically, write_json, write_tensors
from fastmem.models.model import Model
from fastmem.quality.features import FeatureExtractor, Features

SHARD_SCHEMA, FOLDER_SCHEMA = "fastmem.samples/1", "fastmem.sample-folder/1"
BATCH = 64


def even_classes(model: Model) -> dict[int, int]:
    """Equal weights for all classes of a model."""
    return dict.fromkeys(range(model.num_classes), 1)


def sample_labels(class_counts: Mapping[int, int], count: int) -> np.ndarray:
    """Labels of samples in the proportions of ``class_counts``, int64 [count].

    Every start of the sequence keeps the proportions to about one sample of a class; equal counts go round in turn.

    Raises: UsageError for a count below 1, or without classes.
    """
    if count < 1 or not class_counts or min(class_counts.values()) < 1:
        raise UsageError(
            f"expected at least 1 sample and 1 image in every class to sample, got {count} of {len(class_counts)} "
            "classes: ask for more"
        )
    labels = np.array(sorted(class_counts), dtype=np.int64)
    weights = np.array([class_counts[label] for label in labels.tolist()], dtype=np.int64)
    owed = np.zeros(len(labels), dtype=np.int64)
    chosen = np.empty(count, dtype=np.int64)
    for i in range(count):
        owed += weights
        chosen[i] = owed.argmax()
        owed[chosen[i]] -= weights.sum()
    return labels[chosen]


def sample_shard(model: Model, labels: np.ndarray, seed: int, number: int) -> Tensor:
    """Sample images by the model's preset in one batch: labels int64 [n] -> tokens int64 [n,T] on the CPU.

    A function of the weights, the labels, ``seed`` and the shard's ``number`` alone. Raises: UsageError for labels that
    the model lacks.
    """
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    generator = torch.Generator(model.device).manual_seed(int.from_bytes(digest, "big") >> 1)
    prefix = torch.empty(len(labels), 0, dtype=torch.int64)
    return model.generate(torch.from_numpy(labels), prefix, greedy=False, generator=generator).cpu()


@dataclass(frozen=True, eq=False)
class SampleFolder:
    """A folder of shards: tokens, and features beside them for each extractor; every file is whole or not there.

    labels: int64 [N] of all samples; batch: samples of a shard, of which the last one may have fewer.
    """

    path: Path
    labels: np.ndarray
    batch: int

    @property
    def shards(self) -> list[np.ndarray]:
        """Sample numbers of each shard."""
        return [np.arange(i, min(i + self.batch, len(self.labels))) for i in range(0, len(self.labels), self.batch)]

    def start(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Make the folder, or go on in it.

        Raises: UsageError where it holds a part of the samples and ``resume`` is off, or others than ``identity`` says.
        """
        file = self.path / "samples.json"
        if file.exists():
            if not resume and not all(map(self.has_tokens, range(len(self.shards)))):
                raise UsageError(f"expected no unfinished samples in {self.path}, got some: go on with --resume")
            before = read_json(file, FOLDER_SCHEMA)
            for key, value in identity.items():
                if before.get(key) != value:
                    raise UsageError(
                        f"expected samples with {key} {value!r} in {self.path}, got {before.get(key)!r}: remove the "
                        "folder to have them made anew"
                    )
        write_json(file, {"schema": FOLDER_SCHEMA, **identity})

    def has_tokens(self, number: int) -> bool:
        """Whether a shard was sampled."""
        return self._shard_file("tokens", number).exists()

    def tokens(self, number: int) -> Tensor:
        """Tokens int64 [n,T] of a shard. Raises: InputFileError for a missing or damaged file."""
        return read_tensors(self._shard_file("tokens", number), SHARD_SCHEMA)[0]["tokens"].long()

    def save_tokens(self, number: int, tokens: Tensor) -> None:
        """Write a shard's tokens as int16, or int32 where they are larger."""
        narrow = tokens.to(torch.int16 if int(tokens.max()) < 2**15 else torch.int32)
        write_tensors(self._shard_file("tokens", number), {"tokens": narrow}, SHARD_SCHEMA, {"shard": number})

    def has_features(self, number: int, extractor: FeatureExtractor) -> bool:
        """Whether a shard's features were taken."""
        return self._shard_file(extractor.name, number).exists()

    def features(self, extractor: FeatureExtractor) -> Features:
        """Features of all samples. Raises: as ``Features.load``."""
        files = (self._shard_file(extractor.name, number) for number in range(len(self.shards)))
        return Features.join([Features.load(file, _header(extractor)) for file in files])

    def save_features(self, number: int, extractor: FeatureExtractor, features: Features) -> None:
        """Write a shard's features as float32."""
        features.save(self._shard_file(extractor.name, number), _header(extractor))

    def picture_file(self, sample: int) -> Path:
        """Where the PNG file of a sample lies."""
        return self.path / "png" / f"{sample:06d}-class{self.labels[sample]:04d}.png"

    def save_pictures(self, samples: Sequence[int], pixels: np.ndarray) -> None:
        """Write samples as PNG files, uint8 [n,S,S,3]."""
        for sample, picture in zip(samples, pixels, strict=True):
            image = Image.fromarray(picture)
            write_atomically(self.picture_file(sample), lambda partial, image=image: image.save(partial, format="png"))

    def _shard_file(self, kind: str, number: int) -> Path:
        return self.path / kind / f"{number:06d}.safetensors"


def _header(extractor: FeatureExtractor) -> dict[str, str]:
    return {"features": extractor.name, "digest": extractor.digest}
