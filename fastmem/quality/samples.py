"""Samples of a model, drawn and saved in shards, so that an interrupted run resumes with the shards that are missing.

A shard depends only on the weights, the labels, the seed and the number of the shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
# samples in a shard by default
BATCH = 64


def even_classes(model: Model) -> dict[int, int]:
    """Return class counts that give every class of a model the same number of samples."""
    return dict.fromkeys(range(model.num_classes), 1)


def sample_labels(class_counts: Mapping[int, int], count: int) -> np.ndarray:
    """Return the labels of ``count`` samples, int64 [count], in the proportions of ``class_counts``, images by label.

    The first k labels, for any k, have about the same proportions. With equal counts the classes take turns.

    Raises: UsageError where ``count`` is below 1, or there are no classes or a class without images.
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
    """Draw the samples of one shard with the model's preset, and return their tokens, int64 [n,T], on the CPU.

    The samples depend only on the model's weights, the labels, the seed and the number of the shard.

    Args:
        model: the model, edited or not.
        labels: classes of the samples, int64 [n].
        seed: seed of all samples.
        number: number of the shard.

    Raises: UsageError where the model lacks a class.
    """
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    generator = torch.Generator(model.device).manual_seed(int.from_bytes(digest, "big") >> 1)
    prefix = torch.empty(len(labels), 0, dtype=torch.int64)
    return model.generate(torch.from_numpy(labels), prefix, greedy=False, generator=generator).cpu()


@dataclass(frozen=True, eq=False)
class SampleFolder:
    """A folder of samples in shards: a file of tokens for each shard, and a file of features for each extractor.

    Files are written completely or not at all.

    Attributes:
        path: the folder.
        labels: classes of all samples, int64 [N].
        batch: number of samples in a shard; the last one may have fewer.
    """

    path: Path
    labels: np.ndarray
    batch: int

    @property
    def shards(self) -> list[np.ndarray]:
        """Positions of each shard's samples among all samples."""
        return [np.arange(i, min(i + self.batch, len(self.labels))) for i in range(0, len(self.labels), self.batch)]

    def start(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Make the folder, or check that it holds samples of the same ``identity``.

        ``identity`` holds the values, as for JSON, that determine the samples; ``resume`` allows to continue where some
        samples are missing.

        Raises: UsageError where samples are missing and ``resume`` is off, or the folder holds other samples;
        InputFileError where its description is damaged.
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
        """Return whether the tokens of the shard ``number`` are there."""
        return self._shard_file("tokens", number).exists()

    def tokens(self, number: int) -> Tensor:
        """Return the tokens of the shard ``number``, int64 [n,T].

        Raises: InputFileError where its file is missing or damaged.
        """
        return read_tensors(self._shard_file("tokens", number), SHARD_SCHEMA)[0]["tokens"].long()

    def save_tokens(self, number: int, tokens: Tensor) -> None:
        """Write the tokens of the shard ``number``, int64 [n,T], as int16, or as int32 where they need it."""
        narrow = tokens.to(torch.int16 if int(tokens.max()) < 2**15 else torch.int32)
        write_tensors(self._shard_file("tokens", number), {"tokens": narrow}, SHARD_SCHEMA, {"shard": number})

    def has_features(self, number: int, extractor: FeatureExtractor) -> bool:
        """Return whether the features of the shard ``number`` by ``extractor`` are there."""
        return self._shard_file(extractor.name, number).exists()

    def features(self, extractor: FeatureExtractor) -> Features:
        """Return the features of all samples by ``extractor``, which stay in their files.

        Raises: InputFileError where a file is missing or damaged; UsageError where other weights computed the features.
        """
        files = [self._shard_file(extractor.name, number) for number in range(len(self.shards))]
        return Features.load(files, _header(extractor))

    def save_features(self, number: int, extractor: FeatureExtractor, features: Features) -> None:
        """Write the features of the shard ``number`` by ``extractor``, as float32."""
        features.save(self._shard_file(extractor.name, number), _header(extractor))

    def picture_file(self, sample: int) -> Path:
        """Return the path of the PNG file of the sample at position ``sample``."""
        return self.path / "png" / f"{sample:06d}-class{self.labels[sample]:04d}.png"

    def save_pictures(self, samples: Sequence[int], pixels: np.ndarray) -> None:
        """Write the pictures of samples, uint8 [n,S,S,3], as PNG files; ``samples`` are positions among all samples."""
        for sample, picture in zip(samples, pixels, strict=True):
            write_atomically(self.picture_file(sample), partial(Image.fromarray(picture).save, format="png"))

    def _shard_file(self, kind: str, number: int) -> Path:
        return self.path / kind / f"{number:06d}.safetensors"


def _header(extractor: FeatureExtractor) -> dict[str, str]:
    """Return the header of feature files, which says by which network and weights they were computed."""
    return {"features": extractor.name, "digest": extractor.digest}
