"""Evaluate a model, edited or not: compare its samples with real images, and compute its loss on real images."""

from __future__ import annotations

import hashlib
import json
import math
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
from fastmem.runs.owner import owned
from fastmem.tokens.true_images import TrueImages


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: values by name of the metric.
        notes: a sentence for each metric that could not be computed or used fewer images.
        samples: folder of the samples.
        seconds: duration of each part of the work, by name.
    """

    metrics: dict[str, float]
    notes: tuple[str, ...]
    samples: SampleFolder
    seconds: dict[str, float]


def compare(
    extractors: Sequence[FeatureExtractor], samples: Sequence[Features], references: Sequence[Reference]
) -> Comparison:
    """Return the metrics of several feature extractors together.

    ``samples`` holds the features of the samples and ``references`` the reference, one of each for every extractor. A
    metric that is no finite number is left out, and a note says so.
    """
    parts = [e.compare(s, r) for e, s, r in zip(extractors, samples, references, strict=True)]
    metrics = {name: value for part in parts for name, value in part.metrics.items()}
    notes = [note for part in parts for note in part.notes]
    notes += [f"no {name}: it is not a finite number" for name, value in metrics.items() if not math.isfinite(value)]
    return Comparison({name: value for name, value in metrics.items() if math.isfinite(value)}, tuple(notes))


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
    """Return the metrics of a model without writing a file; they equal those of `evaluate` with the same settings.

    Args:
        model: the model, edited or not.
        extractor: the network that computes features of pictures.
        reference: real images to compare the samples with; samples have the same proportions of classes.
        count: number of samples.
        seed: seed of the samples.
        batch_size: number of samples drawn at once, which changes the samples.
        losses: sets of real images whose mean loss is computed, by name; None for none.
        groups: groups of image ids, int64 [n], whose mean loss is computed, by name; None for none.

    Raises: UsageError where ``count`` or ``batch_size`` is below 1, or the reference has a class that the model lacks.
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
    """Draw samples from a model, save them with their features, and compare them with real images.

    Without extractors nothing is sampled, and only losses are computed.

    Args:
        model: the model, edited or not.
        folder: where the samples are saved, in a folder of their own: its name is ``name``, a dash and a hash of
            ``identity`` and the settings.
        name: first part of that folder's name.
        identity: values, as for JSON, that identify the model's weights.
        settings: number, seed and batch size of the samples.
        extractors: networks that compute features of pictures.
        references: real images to compare the samples with, one reference for each extractor; samples have the same
            proportions of classes as the first one.
        losses: sets of real images whose mean loss is computed, by name; None for none.
        groups: groups of image ids, int64 [n], whose mean loss is computed, by name; None for none.
        resume: continue where the folder holds an unfinished set of samples.
        reporter: is given the plan and the number of samples done.

    Raises: UsageError where the folder holds unfinished samples and ``resume`` is off, it holds other samples, or the
    reference has a class that the model lacks; InputFileError where a saved file is damaged; KeyboardInterrupt on
    Ctrl-C, after the current shard was saved.
    """
    labels = _labels(model, references[0] if references else None, settings.samples)
    identity = _identity(model, identity, settings, labels)
    samples = SampleFolder(folder / f"{name}-{_short_hash(identity)}", labels, settings.batch_size)
    sampling = Sampling(model, samples, settings, tuple(extractors))
    found = Comparison({})
    if extractors:
        with owned(samples.path, "evaluate"):
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
