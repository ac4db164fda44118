"""Fill a folder of samples, shard after shard, with tokens, pictures and features."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fastmem.errors import UsageError
from fastmem.models.model import Model
from fastmem.quality.features import FeatureExtractor, Features, to_bytes
from fastmem.quality.samples import BATCH, SampleFolder, sample_shard
from fastmem.reporter import Reporter, size, time_left
from fastmem.runs.interruption import Interruption

# samples that measure the speed of a CPU; on a GPU a whole shard is drawn, because fewer samples do not keep it busy
PROBE = 8


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation's samples.

    Attributes:
        samples: number of samples.
        seed: seed of the samples.
        batch_size: number of samples drawn at once, which changes the samples.
        pictures: whether samples are also written as PNG files, which does not change them.

    Raises: UsageError where ``samples`` or ``batch_size`` is below 1.
    """

    samples: int
    seed: int = 0
    batch_size: int = BATCH
    pictures: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise UsageError(
                f"expected at least 1 sample in batches of at least 1, got {self.samples} in batches of "
                f"{self.batch_size}: raise them"
            )


@dataclass(frozen=True)
class EvaluationPlan:
    """The expected size and duration of sampling.

    Attributes:
        samples: number of samples.
        done: number of samples that are there already.
        disk_bytes: space on disk, in bytes, of the missing samples.
        seconds: duration for the missing samples, at the measured speed; None where no speed was measured.
        things: plural noun for what is counted.
    """

    samples: int
    done: int
    disk_bytes: int
    seconds: float | None
    things: str = "samples"

    @property
    def total(self) -> int:
        """Number of samples."""
        return self.samples

    def __str__(self) -> str:
        if self.done == self.samples:
            return f"all {self.samples:,} samples are there already"
        done = f" ({self.done:,} are there)" if self.done else ""
        return f"sampling {self.samples:,} images{done}, about {size(self.disk_bytes)} on disk{time_left(self.seconds)}"


@dataclass
class Sampling:
    """A pass over the shards of a folder that makes what is missing.

    Attributes:
        model: the model, edited or not.
        samples: the folder.
        settings: number, seed and batch size of the samples.
        extractors: networks that compute features of the samples.
        seconds: time spent so far, by part of the work.
    """

    model: Model
    samples: SampleFolder
    settings: EvaluationSettings
    extractors: tuple[FeatureExtractor, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, reporter: Reporter) -> None:
        """Make the tokens, pictures and features that are missing, and tell ``reporter`` how many samples are done.

        Raises: KeyboardInterrupt on Ctrl-C, after the current shard was saved.
        """
        left = [number for number in range(len(self.samples.shards)) if self._is_missing(number)]
        reporter.planned(self._plan(left))
        reporter.advance(len(self.samples.labels) - self._count(left))
        with Interruption() as interruption:
            for number in left:
                self._fill(number)
                reporter.advance(len(self.samples.shards[number]))
                if interruption.requested:
                    raise interruption.stopped

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time spent inside this context to the seconds of a part."""
        started = time.monotonic()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - started, 3)

    def _is_missing(self, number: int) -> bool:
        return bool(not self.samples.has_tokens(number) or self._extractors_left(number) or self._pictures_left(number))

    def _count(self, numbers: Sequence[int]) -> int:
        return sum(len(self.samples.shards[number]) for number in numbers)

    def _extractors_left(self, number: int) -> list[FeatureExtractor]:
        return [e for e in self.extractors if not self.samples.has_features(number, e)]

    def _pictures_left(self, number: int) -> list[int]:
        members = self.samples.shards[number].tolist() if self.settings.pictures else []
        return [sample for sample in members if not self.samples.picture_file(sample).exists()]

    def _plan(self, left: Sequence[int]) -> EvaluationPlan:
        """Return the plan; where more than two shards are left, a few samples are drawn to measure the speed."""
        count, seconds = self._count(left), None
        if len(left) > 2:
            probe = self.samples.labels[: self.settings.batch_size if self.model.device.type == "cuda" else PROBE]
            started = time.monotonic()
            pixels = to_bytes(self.model.decode(sample_shard(self.model, probe, self.settings.seed, 0)))
            for extractor in self.extractors:
                extractor(pixels)
            seconds = (time.monotonic() - started) / len(probe) * count
        numbers = 2 * self.model.num_tokens + 4 * sum(e.dimensions for e in self.extractors)
        return EvaluationPlan(len(self.samples.labels), len(self.samples.labels) - count, numbers * count, seconds)

    def _fill(self, number: int) -> None:
        """Make what is missing of one shard."""
        members = self.samples.shards[number]
        tokens = self._tokens(number)
        extractors, pictures = self._extractors_left(number), self._pictures_left(number)
        if not extractors and not pictures:
            return
        with self.timed("decoding"):
            pixels = to_bytes(self.model.decode(tokens))
        self.samples.save_pictures(pictures, pixels[np.isin(members, pictures)])
        for extractor in extractors:
            with self.timed("features"):
                features: Features = extractor(pixels)
            self.samples.save_features(number, extractor, features)

    def _tokens(self, number: int) -> Tensor:
        """Return the tokens of one shard, read from its file or sampled now."""
        if self.samples.has_tokens(number):
            return self.samples.tokens(number)
        with self.timed("sampling"):
            labels = self.samples.labels[self.samples.shards[number]]
            tokens = sample_shard(self.model, labels, self.settings.seed, number)
        self.samples.save_tokens(number, tokens)
        return tokens
