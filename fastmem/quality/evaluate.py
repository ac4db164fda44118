"""The evaluation of a model, edited or not: samples against a reference, and losses of real images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.models.model import Model
from fastmem.quality.features import Comparison, FeatureExtractor, Features, Reference, to_bytes
from fastmem.quality.losses import mean_losses
from fastmem.quality.samples import BATCH, SampleFolder, even_classes, sample_labels, sample_shard
from fastmem.quality.sampling import EvaluationSettings, Sampling
from fastmem.reporter import SILENT, Reporter
from fastmem.tokens.true_images import TrueImages


@dataclass(frozen=True)
class Evaluation:
    """What was found: metrics by name, a sentence for each that could not be had, the samples, seconds by part."""

    metrics: dict[str, float]
    notes: tuple[str, ...]
    samples: SampleFolder
    seconds: dict[str, float]


def compare(
    extractors: Sequence[FeatureExtractor], samples: Sequence[Features], references: Sequence[Reference]
) -> Comparison:
    """The metrics of all extractors, each with its samples' features and its reference."""
    parts = [e.compare(s, r) for e, s, r in zip(extractors, samples, references, strict=True)]
    metrics = {name: value for part in parts for name, value in part.metrics.items()}
    return Comparison(metrics, tuple(note for part in parts for note in part.notes))


def measure(
    model: Model,
    extractor: FeatureExtractor,
    reference: Reference,
    count: int,
    seed: int = 0,
    batch_size: int = BATCH,
    losses: Mapping[str, TrueImages] | None = None,
    groups: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Metrics of a model in memory, nothing written: the numbers that ``evaluate`` finds with the same settings.

    count: samples, in the proportions of the reference's classes; losses: sets of real images whose loss is taken too;
    groups: image ids by name.

    Raises: UsageError for a count or batch below 1, or classes that the model lacks.
    """
    folder = SampleFolder(Path(), _labels(model, reference, count), batch_size)
    parts = []
    for number, members in enumerate(folder.shards):
        tokens = sample_shard(model, folder.labels[members], seed, number)
        parts.append(extractor(to_bytes(model.decode(tokens))))
    found = compare([extractor], [Features.join(parts)], [reference])
    return {**found.metrics, **mean_losses(model, losses or {}, groups)}


def evaluate(
    model: Model,
    folder: Path,
    name: str,
    identity: Mapping[str, Any],
    settings: EvaluationSettings,
    extractors: Sequence[FeatureExtractor],
    references: Sequence[Reference],
    *,
    losses: Mapping[str, TrueImages] | None = None,
    groups: Mapping[str, np.ndarray] | None = None,
    resume: bool = False,
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Sample a model into ``folder``/NAME-HASH, take the features of all extractors, and compare them.

    identity: what tells the model's weights from others', JSON values; the hash is of it and the settings. references:
    one for each extractor; samples are in the proportions of the first one's classes. Without extractors nothing is
    sampled, and only losses are taken. Ctrl-C stops after a shard.

    Raises: UsageError where samples are there and ``resume`` is off; see ``SampleFolder`` and ``sample_labels``.
    """
    labels = _labels(model, references[0] if references else None, settings.samples)
    identity = _identity(model, identity, settings, labels)
    samples = SampleFolder(folder / f"{name}-{_short_hash(identity)}", labels, settings.batch_size)
    sampling = Sampling(model, samples, settings, tuple(extractors))
    found = Comparison({})
    if extractors:
        samples.start(identity, resume)
        sampling.run(reporter)
        found = compare(extractors, [samples.features(e) for e in extractors], references)
    with sampling.timed("losses"):
        metrics = {**found.metrics, **mean_losses(model, losses or {}, groups)}
    return Evaluation(metrics, found.notes, samples, sampling.seconds)


def _labels(model: Model, reference: Reference | None, count: int) -> np.ndarray:
    return sample_labels((reference and reference.class_counts) or even_classes(model), count)


def _identity(
    model: Model, identity: Mapping[str, Any], settings: EvaluationSettings, labels: np.ndarray
) -> dict[str, Any]:
    preset = {key: value for key, value in vars(model.preset).items() if value is not None}
    return {
        **identity,
        "samples": settings.samples,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "preset": preset,
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
    }


def _short_hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
