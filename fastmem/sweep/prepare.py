"""Prepare what all rows of a sweep share: targets and their halves, real images for losses, and the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.extraction.attack import BATCH_ROWS, attack
from fastmem.extraction.candidates import TOP_PER_CLASS, Targets, find_targets, highest_per_class
from fastmem.extraction.verdicts import Judge
from fastmem.mitigation.attribution import BATCH_IMAGES, HELDOUT_IMAGES, halves
from fastmem.models.model import Model
from fastmem.quality.evaluate import measure
from fastmem.quality.features import FeatureExtractor
from fastmem.quality.losses import mean_losses, read_loss_images
from fastmem.quality.reference import read_reference
from fastmem.quality.samples import BATCH
from fastmem.reporter import SILENT, Reporter
from fastmem.stats import UnitStats
from fastmem.sweep.model_bench import ModelBench, UnitChooser
from fastmem.sweep.table import TargetSet
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import TrueImages, spread

# larger than every row's seed, so that sweeps with different seeds never use the same numbers
SEED_STRIDE = 100_003


@dataclass(frozen=True)
class BenchSettings:
    """Settings of the measurements, the same for all rows of a sweep.

    Attributes:
        prefixes: prefix lengths, in tokens, ascending.
        samples: number of samples whose quality is measured; 0 measures losses only.
        halved: whether results are reported on one half of the targets only, because units may be chosen on the other.
        top_per_class: number of targets of every class.
        seed: seed of the halves and of all random draws.
        batch_size: number of samples drawn at once; below the usual number it also limits the completions, and the
            images of a backward pass, that are computed at once.
    """

    prefixes: tuple[int, ...]
    samples: int
    halved: bool
    top_per_class: int = TOP_PER_CLASS
    seed: int = 0
    batch_size: int = BATCH

    @property
    def batch_rows(self) -> int:
        """Number of completions computed at once."""
        return BATCH_ROWS if self.batch_size >= BATCH else self.batch_size

    def seed_of(self, row_seed: int) -> int:
        """Return the seed of the random draws of a row with seed ``row_seed``."""
        return self.seed * SEED_STRIDE + row_seed


@dataclass(frozen=True, eq=False)
class Prepared:
    """The bench of a sweep with its targets.

    Attributes:
        settings: settings of the measurements.
        bench: makes the edits of rows, attacks the targets and measures the quality.
        targets: all images that are attacked.
        counted: the classes of the targets, and which of them are reported.
    """

    settings: BenchSettings
    bench: ModelBench
    targets: Targets
    counted: TargetSet


def prepare(
    model: Model,
    sources: Mapping[str, ImageSource],
    manifests: Mapping[str, Manifest],
    stats: Mapping[str, UnitStats],
    hits: np.ndarray,
    judge: Judge,
    extractor: FeatureExtractor | None,
    settings: BenchSettings,
    groups: Mapping[str, np.ndarray],
    *,
    tokens: TokenCache | None = None,
    features: Path | None = None,
    reporter: Reporter = SILENT,
) -> Prepared:
    """Return the bench and the targets of a sweep, with all images read and tokenized.

    Attribution chooses units on one half of the targets and of the held-out images. Counts and losses are reported on
    the other halves.

    Args:
        model: the unedited model.
        sources: images of the sets "train" and "heldout".
        manifests: order of the images by set.
        stats: statistics of the images by set.
        hits: candidate scores of the training images, float [N] in manifest order.
        judge: measures how similar completions and their targets are.
        extractor: computes features of the samples; None measures losses only.
        settings: settings of the measurements.
        groups: ids of training images that are also counted by themselves, by name.
        tokens: where tokens are looked up; None for no cache.
        features: folder where features of the reference are saved; None saves nothing.
        reporter: is given the number of images to read, and the number of images read.

    Raises: UsageError where there is no held-out set; InputFileError where no image of a set can be read.
    """
    if "heldout" not in manifests:
        raise UsageError(
            "expected a run with held-out images, on which quality is measured, got a run without: score again with "
            "--heldout PATH"
        )
    positions = highest_per_class(manifests["train"], hits, settings.top_per_class)
    targets = find_targets(model, sources["train"], manifests["train"], hits, positions, cache=tokens)
    chosen_by = halves(targets.ids, targets.labels, settings.seed)
    reported = ~chosen_by if settings.halved else np.ones(len(targets), dtype=bool)
    unseen = read_loss_images(model, sources["heldout"], manifests["heldout"], cache=tokens, reporter=reporter)
    seen_half = halves(unseen.ids, unseen.labels.numpy(), settings.seed)
    losses = {"heldout": unseen.take(~seen_half), "targets": _true_images(targets.take(reported))}
    quality = _quality(model, sources["heldout"], manifests["heldout"], extractor, settings, losses, features, reporter)
    memorised = _memorised(model, targets, chosen_by, judge, settings)
    seen = unseen.take(np.flatnonzero(seen_half)[spread(int(seen_half.sum()), HELDOUT_IMAGES)])
    images_at_once = min(BATCH_IMAGES, settings.batch_size)
    chooser = UnitChooser(model, stats["train"], stats["heldout"], memorised, seen, settings.seed_of, images_at_once)
    bench = ModelBench(model, chooser, targets, judge, settings.prefixes, quality, settings.batch_rows)
    masks = {name: np.isin(targets.ids, ids) for name, ids in groups.items()}
    counted = TargetSet(targets.labels, reported, settings.prefixes, judge.threshold, masks)
    return Prepared(settings, bench, targets, counted)


def _quality(
    model: Model,
    source: ImageSource,
    manifest: Manifest,
    extractor: FeatureExtractor | None,
    settings: BenchSettings,
    losses: Mapping[str, TrueImages],
    cache: Path | None,
    reporter: Reporter,
) -> Callable[[Model, int], dict[str, float]]:
    """Return a function that gives a model's losses and, with an extractor, metrics of its samples, for a seed."""
    if extractor is None:
        return lambda model, seed: mean_losses(model, losses)
    reference = read_reference(
        source,
        manifest,
        model.view_recipe("center"),
        extractor,
        description="held-out images",
        cache=cache,
        reporter=reporter,
    )
    return lambda model, seed: measure(
        model, extractor, reference, settings.samples, settings.seed_of(seed), settings.batch_size, losses
    )


def _memorised(
    model: Model, targets: Targets, chosen_by: np.ndarray, judge: Judge, settings: BenchSettings
) -> TrueImages:
    """Return the targets that units may be chosen on and that are extracted without an edit, or all where none are."""
    half = targets.take(chosen_by)
    longest = settings.prefixes[-1:]
    completed = attack(model, half, longest, batch_size=settings.batch_rows)
    given = judge.similarities(model, half, longest, completed)[0] > judge.threshold
    return _true_images(half.take(given) if given.any() else half)


def _true_images(targets: Targets) -> TrueImages:
    return TrueImages(targets.ids, torch.from_numpy(targets.labels), targets.tokens)
