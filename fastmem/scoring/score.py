"""Score the units of a model: one pass over the images that turns responses into statistics.

Images are cropped into views and encoded as tokens. The model predicts each true token from those before it, and the
responses of its units are summed up at once, so no activation is kept.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from fastmem.backends.select import Backend, choose_backend
from fastmem.data.decoding import Skipped
from fastmem.data.loading import Flow, check_readable
from fastmem.data.manifest import Manifest, WorkUnit
from fastmem.data.sources import ImageSource, TokenSource
from fastmem.data.views import Joined
from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json, read_tensors, write_json, write_tensors
from fastmem.models.model import Model
from fastmem.reporter import SILENT, Reporter, tell_skipped
from fastmem.runs.folder import RunFolder, check_writable, run_id
from fastmem.runs.interruption import Interruption
from fastmem.runs.ranks import AHEAD, Ranks, WorkQueue
from fastmem.scoring.class_order import check_class_order, check_labels
from fastmem.scoring.image_losses import ImageLosses
from fastmem.scoring.plan import ScorePlan, TokenPlan, disk_bytes, keeps_rows, plan_tokens, waiting_bytes
from fastmem.scoring.running_set import RunningSet, RunningShape, Seen, as_rows, from_rows
from fastmem.scoring.settings import ScoreSettings
from fastmem.scoring.shard import Shard
from fastmem.scoring.shared_units import SharedUnits
from fastmem.stats import StatsBuilder, UnitStats
from fastmem.stats.class_rows import row_folder
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.encoding import tokens_of

STATE_SCHEMA = "fastmem.score-state/2"
SKIPPED_SCHEMA = "fastmem.skipped/1"
# images in a work unit, at most; a GPU does many in the time that a unit's results take to be added
UNIT_IMAGES, GPU_UNIT_IMAGES = 64, 1024
# progress is saved at this interval
SAVE_SECONDS = 30.0


class SkippedShape(TypedDict):
    """The document of images that were left out."""

    images: list[Skipped]


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """The results of a scoring pass.

    Attributes:
        train: statistics of the training images; ``train.matched`` holds those of the part that matches the held-out
            set in size, classes and folds, None where all training images do.
        heldout: statistics of the held-out images; None without a held-out set.
        train_losses: loss and hits of every training image; None where they were not asked for.
        heldout_losses: loss and hits of every held-out image; None where they were not asked for.
        manifests: the images by set, "train" and "heldout".
        skipped: images that could not be read, each with the reason.
        backend: name of the backend that computed the responses.
        device: device of the model.
        seconds: duration of the pass in this process.
        images_per_second: speed of the pass in this process.
        run: the run folder; None for a result that is only in memory.
    """

    train: UnitStats
    heldout: UnitStats | None
    train_losses: ImageLosses | None
    heldout_losses: ImageLosses | None
    manifests: dict[str, Manifest]
    skipped: tuple[Skipped, ...]
    backend: str
    device: str
    seconds: float
    images_per_second: float
    run: Path | None


def responses(
    model: Model, tokens: Tensor, labels: Tensor, *, segments: Sequence[str] | None = None, backend: str = "auto"
) -> Tensor:
    """Return the responses of all units to images, given by their tokens: float32 [N,layers,segments,units].

    The response of a unit is its mean absolute activation over the positions of a segment.

    Args:
        model: the model.
        tokens: true tokens of the images, int64 [N,T].
        labels: classes of the images, int64 [N].
        segments: names of segments; None for the model's default ones.
        backend: name of the backend, or "auto" for the fastest one available.

    Raises: UsageError for an unknown segment or backend, or for tokens or labels of another shape or range.

    Source: arXiv 2509.00488, section 3 (absolute activations, averaged over positions).
    """
    return model.responses(tokens, labels, segments, choose_backend(backend, model.device))


def score_images(
    model: Model,
    sets: Mapping[str, ImageSource],
    settings: ScoreSettings,
    *,
    backend: str = "auto",
    out: Path | None = None,
    resume: bool = False,
    check_classes: bool = True,
    workers: int | None = None,
    token_cache: str | Path | None = None,
    reporter: Reporter = SILENT,
    ranks: Ranks | None = None,
    shard: Shard | None = None,
) -> ScoreResult:
    """Compute statistics of every unit's responses to the images, in one pass that keeps no activation.

    A held-out set is reduced to the classes of the training set, with at most as many images of each class as the
    training set has. The statistics of the training images that match it are also kept in ``train.matched``.

    Args:
        model: the model.
        sets: images by set: "train", and optionally "heldout".
        settings: the settings that the results depend on.
        backend: name of the backend, or "auto" for the fastest one available.
        out: folder of the run; None keeps the results in memory.
        resume: continue the interrupted run in ``out``.
        check_classes: refuse images whose class order does not fit the checkpoint.
        workers: number of processes that decode images; None to choose it by the number of cores.
        token_cache: folder where tokens are kept for later passes; "auto" for the one in ``FASTMEM_HOME``, and None or
            "off" for no cache.
        reporter: its ``planned`` is given the `ScorePlan`, its ``advance`` the number of images done, and its ``note``
            sentences for a person to read.
        ranks: the ranks of the job, which share the work and give the same results as one process; they need ``out``.
        shard: the slice of the images that is scored; None for all of them.

    Raises: UsageError where settings do not fit the model or the images, or where the folder cannot be written or holds
    another run; InputFileError where the run folder is damaged; KeyboardInterrupt on Ctrl-C, after progress was saved.
    """
    chosen = choose_backend(backend, model.device, pre_activation=settings.activation == "pre")
    if out is not None:
        check_writable(out)
    cache = TokenCache.open(token_cache, model, reporter.note)
    folder = None if out is None else RunFolder(out)
    scorer = _Scorer(model, settings, chosen, folder, reporter, workers, cache, ranks, shard)
    return scorer.run(sets, resume, check_classes)


@dataclass
class _Scorer:
    model: Model
    settings: ScoreSettings
    backend: Backend
    folder: RunFolder | None
    reporter: Reporter
    workers: int | None
    cache: TokenCache | None
    ranks: Ranks | None
    shard: Shard | None

    def __post_init__(self) -> None:
        self.recipe = self.model.view_recipe(self.settings.views)
        # losses are computed on the centre view, which is loaded as one view more where responses do not use it
        self.adds_centre = self.settings.per_image and self.settings.views != "center"
        self.loaded = Joined(self.recipe, self.model.view_recipe("center")) if self.adds_centre else self.recipe
        self.segments = self.model.find_segments(self.settings.segments)
        self.shape = (self.model.num_layers, len(self.segments), self.model.num_units)
        self.unit_images = UNIT_IMAGES if self.model.device.type == "cpu" else GPU_UNIT_IMAGES
        # for every position in the training manifest, whether the image is matched to the held-out set; None where all
        # are, or there is no such set
        self.matched: np.ndarray | None = None
        # by set, whether a row is kept for every class
        self.keeps: dict[str, bool] = {}
        self.skipped: dict[str, list[Skipped]] = {}
        self.losses: dict[str, ImageLosses] = {}
        self.saved = time.monotonic()
        # the run's inputs, as run.json has them; known as soon as the images are listed
        self.identity: dict[str, Any] = {}

    def run(self, sets: Mapping[str, ImageSource], resume: bool, check_classes: bool) -> ScoreResult:
        whole = self._manifests(sets)
        for manifest in whole.values():
            check_labels(self.model, manifest)
        self.keeps = {split: keeps_rows(self.settings, self.shape, manifest) for split, manifest in whole.items()}
        manifests = self._slice(whole)
        sets = {split: source for split, source in sets.items() if split in manifests}
        if self.backend.missed:
            self.reporter.note(f"backend torch, because the faster one is missing: {self.backend.missed}")
        named, known = len(manifests["train"].classes), self.model.num_classes
        if named != known:
            self.reporter.note(
                f"the images name {named} classes and the checkpoint has {known}: labels are taken as positions in the "
                "images' class order, so a subset needs the checkpoint's whole order (--classes FILE)"
            )
        self.identity = self._identity(manifests, whole)
        leads = self.ranks is None or self.ranks.leads
        goes_on = leads and self.folder is not None and self.folder.check(self.identity, resume)
        if any(isinstance(source, TokenSource) for source in sets.values()):
            # they need not be kept a second time
            self.cache = None
        tokens, self.cache = plan_tokens(self.cache, self.loaded, manifests, self.reporter.note)
        if leads:
            if check_classes and not goes_on:
                self._check_class_order(sets["train"], whole["train"])
            if self.folder is not None and not goes_on:
                self.folder.start(self.identity)
            if self.folder is not None:
                for split, manifest in manifests.items():
                    manifest.save(self.folder.manifest_file(split))
            self.reporter.planned(self._plan(sets["train"], manifests, tokens))
        self._agree()
        started, images = time.monotonic(), 0
        stats: dict[str, UnitStats] = {}
        for split, source in sets.items():
            stats[split], done = self._score_set(split, source, manifests[split])
            images += done
        seconds = time.monotonic() - started
        if self.folder is not None and leads:
            self.folder.state_file.unlink(missing_ok=True)
            shutil.rmtree(self.folder.units_folder, ignore_errors=True)
        skipped = [s for source in sets.values() for s in source.skipped]
        skipped += [s for split in sets for s in self.skipped[split]]
        return ScoreResult(
            stats["train"],
            stats.get("heldout"),
            self.losses.get("train"),
            self.losses.get("heldout"),
            manifests,
            tuple(skipped),
            self.backend.name,
            str(self.model.device),
            seconds,
            images / max(seconds, 1e-9),
            None if self.folder is None else self.folder.path,
        )

    def _agree(self) -> None:
        """Check that all ranks see the same images, weights and settings. Raises: UsageError where they do not."""
        if self.ranks is None:
            return
        mine = run_id(self.identity)
        if self.ranks.leads:
            self.ranks.tell(self.ranks.key("run"), mine)
        elif (theirs := self.ranks.wait_for(self.ranks.key("run"))) != mine:
            raise UsageError(
                f"expected the same images, weights and settings in every rank, got run {mine} in rank "
                f"{self.ranks.rank} and {theirs} in rank 0: give all ranks the same files and options"
            )

    def _manifests(self, sets: Mapping[str, ImageSource]) -> dict[str, Manifest]:
        """Return the manifest of each set; of the held-out images only those that training images can match."""
        per_class, seed = self.settings.per_class, self.settings.seed
        manifests = {split: Manifest.build(source, per_class, seed) for split, source in sets.items()}
        if "heldout" in manifests:
            given = manifests["heldout"]
            mask, manifests["heldout"] = manifests["train"].match(given, seed)
            self.matched = None if mask.all() else mask
            if len(manifests["heldout"]) < len(given):
                self.reporter.note(
                    f"of {len(given):,} held-out images {len(manifests['heldout']):,} are taken, of no class more than "
                    "the training set has"
                )
        return manifests

    def _slice(self, manifests: dict[str, Manifest]) -> dict[str, Manifest]:
        """Return the part of each manifest that this pass scores; all decisions are made on the whole before."""
        if self.shard is None:
            return manifests
        positions = self.shard.cut(manifests)
        if self.matched is not None:
            self.matched = self.matched[positions["train"]]
        self.reporter.note(
            f"slice {self.shard.number} of {self.shard.of}: {len(positions['train']):,} of "
            f"{len(manifests['train']):,} images"
        )
        return {split: manifests[split].take(at) for split, at in positions.items()}

    def _identity(self, manifests: dict[str, Manifest], whole: dict[str, Manifest]) -> dict[str, Any]:
        settings = asdict(self.settings) | {"segments": [s.name for s in self.segments]}
        return {
            "stage": "score",
            "model": self.model.name,
            **self.model.fingerprint(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "backend": self.backend.name,
            "recipe": self.recipe.name,
            "work_unit": self.unit_images,
            "settings": settings,
            "manifests": {split: manifest.hash for split, manifest in manifests.items()},
            **({} if self.shard is None else {"shard": self.shard.document(whole)}),
        }

    def _origin(self, split: str, manifest: Manifest) -> dict[str, Any]:
        return {
            **self._owner(split),
            "model": self.model.name,
            **self.model.fingerprint(),
            "manifest": manifest.hash,
            "views": self.recipe.name,
            "activation": self.settings.activation,
            "seed": self.settings.seed,
        }

    def _owner(self, split: str) -> dict[str, str]:
        """Return the entries that the files of a set carry."""
        return {"run": run_id(self.identity), "set": split}

    def _check_class_order(self, source: ImageSource, manifest: Manifest) -> None:
        losses = check_class_order(self.model, source, manifest, self.cache)
        if losses is None:
            self.reporter.note("the class order is not checked: the images are all of one class")
        else:
            self.reporter.note(
                f"class order fits: {losses[0]:.3f} nats per token with own labels, {losses[1]:.3f} with shuffled ones"
            )

    def _plan(self, source: ImageSource, manifests: dict[str, Manifest], tokens: TokenPlan) -> ScorePlan:
        """Return the plan; the duration is estimated from one batch that is run and thrown away."""
        images = {split: len(manifest) for split, manifest in manifests.items()}
        disk = 0 if self.folder is None else disk_bytes(self.shape, manifests, self.keeps)
        if self.ranks is not None:
            disk += waiting_bytes(self.shape, self.matched is not None, AHEAD * self.ranks.size)
        seconds = None
        probe = np.arange(min(self._images_per_batch, len(manifests["train"])))
        complete = self.folder is not None and all(self.folder.stats_file(split).exists() for split in manifests)
        if sum(images.values()) > 4 * len(probe) and not complete:
            seconds = self._probe(source, manifests["train"], probe, tokens.stored)
            together = 1 if self.ranks is None else self.ranks.size
            seconds = None if seconds is None else seconds * sum(images.values()) / together
        return ScorePlan(images["train"], images.get("heldout", 0), self.recipe.count, disk, seconds, tokens)

    def _probe(self, source: ImageSource, manifest: Manifest, positions: np.ndarray, stored: float) -> float | None:
        """Return the seconds per image if the tokens of a share ``stored`` are cached; None if no image can be read."""
        # the first call also allocates memory and chooses kernels, so the second call is timed
        for batch in (positions[:1], positions):
            started = time.monotonic()
            cache = self.cache if stored == 1 else None
            # these tokens are not cached, because the pass may batch the images differently and so round differently
            ((kept, tokens, _),) = tokens_of(
                self.model, source, manifest, [batch], self.loaded, cache, keep=False, workers=0
            )
            encoded = time.monotonic()
            if not len(kept):
                return None
            self._see(tokens, kept, manifest)
            seen = time.monotonic()
        return ((encoded - started) * (1 - stored) + seen - encoded) / len(kept)

    @property
    def _images_per_batch(self) -> int:
        views: int = self.recipe.count
        return max(1, self.settings.batch_size // views)

    def _see(self, tokens: Tensor, positions: np.ndarray, manifest: Manifest) -> Seen:
        """Run the forward pass over tokens int64 [n,views,T] of the images at manifest positions int64 [n]."""
        model, names = self.model, [s.name for s in self.segments]
        labels = torch.from_numpy(manifest.labels[positions])
        centre, tokens = tokens[:, -1], tokens[:, : self.recipe.count]
        per_view = labels.repeat_interleave(self.recipe.count)
        outcomes = None
        if self.settings.per_image and not self.adds_centre:
            found, outcomes = model.responses_and_outcomes(centre, labels, names, self.backend)
        else:
            found = model.responses(tokens.flatten(0, 1), per_view, names, self.backend)
        found = found.unflatten(0, tokens.shape[:2])
        if not self.settings.per_image:
            return Seen(positions, found)
        outcomes = outcomes or model.outcomes(centre, labels)
        unconditional = model.outcomes(centre, None).loss.mean(1) if self.settings.unconditional else None
        return Seen(positions, found, outcomes, model.hit_share(outcomes), unconditional)

    def _score_set(self, split: str, source: ImageSource, manifest: Manifest) -> tuple[UnitStats, int]:
        """Score one set, or read its results; return its statistics and the number of images scored now."""
        folder, helps = self.folder, self.ranks is not None and not self.ranks.leads
        units = manifest.work_units(self.unit_images)
        if helps:
            self._help(split, source, manifest, units)
        if folder is not None and (helps or folder.stats_file(split).exists()):
            self._tell_saved(split, len(units))
            self.skipped[split] = from_rows(
                read_json(folder.skipped_file(split), SKIPPED_SCHEMA, SkippedShape, self._owner(split))["images"]
            )
            if self.settings.per_image:
                self.losses[split] = ImageLosses.load(folder.losses_file(split), manifest.hash, self._owner(split))
            self.reporter.advance(len(manifest))
            tell_skipped(len(self.skipped[split]))
            return UnitStats.load(folder.stats_file(split), self._owner(split)), 0
        running = self._start_set(split, manifest)
        if running.units > len(units):
            raise InputFileError(
                f"expected at most {len(units)} finished work units in {folder and folder.state_file}, got "
                f"{running.units}: start anew with another --out"
            )
        before = units[running.units - 1].stop if running.units else 0
        self.reporter.advance(before)
        tell_skipped(len(running.skipped))
        if self.ranks is None:
            self._score_units(split, source, running, units)
        else:
            self._share_units(split, source, running, units)
        stats = running.finish(self._origin(split, manifest))
        self.skipped[split] = running.skipped
        if running.losses is not None:
            self.losses[split] = running.losses
        if folder is not None and split == "train" and not stats.count and self.shard is None:
            # nothing came of it, and the folder can be taken again once the images can be read; another slice may have
            # images that can
            folder.remove_unscored()
            check_readable(source, len(manifest), 0, next(iter(running.skipped), None))
        if folder is not None:
            write_json(
                folder.skipped_file(split),
                {"schema": SKIPPED_SCHEMA, **self._owner(split), "images": as_rows(running.skipped)},
            )
            if running.losses is not None:
                running.losses.save(folder.losses_file(split), manifest.hash, self._owner(split))
            stats.save(folder.stats_file(split))
            self._tell_saved(split)
        return stats, len(manifest) - before

    def _tell_saved(self, split: str, units: int | None = None) -> None:
        """Tell the helping ranks that a set's results can be read, and of a set of ``units`` that was there already."""
        if self.ranks is None or not self.ranks.leads:
            return
        if units is not None:
            self._queue(split, units).open(units)
        self.ranks.tell(self.ranks.key(f"{split}/saved"))

    def _start_set(self, split: str, manifest: Manifest) -> RunningSet:
        """Return the results so far for a set: those that were saved, or empty ones."""
        running = self._empty_set(split, manifest)
        if self.folder is not None and self.folder.state_file.exists():
            owner = {"run": run_id(self.identity)}
            tensors, header = read_tensors(self.folder.state_file, STATE_SCHEMA, RunningShape, owner)
            if header["set"] == split:
                running.restore(tensors, header, self.folder.state_file)
        return running

    def _empty_set(self, split: str, manifest: Manifest) -> RunningSet:
        keep_rows = self.keeps[split]
        rows_in = row_folder(self.folder.stats_file(split)) if self.folder is not None and keep_rows else None
        builder = self._builder(split, keep_rows, rows_in)
        mask = self.matched if split == "train" else None
        return RunningSet(
            manifest,
            builder,
            mask,
            None if mask is None else self._builder(split, False, None),
            ImageLosses.zero(len(manifest), self.settings.unconditional) if self.settings.per_image else None,
            unit_update=self.backend.unit_update_,
        )

    def _builder(self, split: str, keep_rows: bool, rows_in: Path | None) -> StatsBuilder:
        names = [s.name for s in self.segments]
        class_only = [s.name for s in self.segments if s.class_only]
        return StatsBuilder(
            self.shape, names, class_only, keep_rows, rows_in, device=self.model.device, owner=self._owner(split)
        )

    def _score_units(self, split: str, source: ImageSource, running: RunningSet, units: list[WorkUnit]) -> None:
        """Score the work units that are not finished yet, in order, and add them to the results."""
        manifest = running.manifest
        batches = list(_cut_batches(units[running.units :], self._images_per_batch))
        cut = [positions for positions, _ in batches]
        encoded = tokens_of(
            self.model, source, manifest, cut, self.loaded, self.cache, workers=self.workers, note=self.reporter.note
        )
        with Interruption() as interruption:
            for (positions, ends_unit), batch in zip(batches, encoded, strict=True):
                if len(batch.positions):
                    running.update(self._see(batch.tokens, batch.positions, manifest), batch.skipped)
                else:
                    running.skip(batch.skipped)
                if ends_unit:
                    running.end_unit(units[running.units].label)
                    if time.monotonic() - self.saved > SAVE_SECONDS:
                        self._save(split, running)
                self.reporter.advance(len(positions))
                if interruption.requested:
                    self._save(split, running)
                    raise interruption.stopped
            self._save(split, running)

    def _help(self, split: str, source: ImageSource, manifest: Manifest, units: list[WorkUnit]) -> None:
        """Compute work units of a set for the leading rank, until it has written the set's results."""
        assert self.ranks is not None
        self._share_units(split, source, self._empty_set(split, manifest), units)
        self.ranks.wait_for(self.ranks.key(f"{split}/saved"))

    def _queue(self, split: str, units: int) -> WorkQueue:
        assert self.ranks is not None
        return WorkQueue(self.ranks, split, units, bounded=True)

    def _share_units(self, split: str, source: ImageSource, running: RunningSet, units: list[WorkUnit]) -> None:
        """Score work units that no other rank does; in the leading rank, add those of all to the results in order."""
        assert self.ranks is not None
        assert self.folder is not None
        queue, manifest = self._queue(split, len(units)), running.manifest
        if self.ranks.leads:
            queue.open(running.units)
        else:
            queue.join()
        with Interruption() as interruption:

            def added(images: int) -> None:
                self.reporter.advance(images)
                if time.monotonic() - self.saved > SAVE_SECONDS:
                    self._save(split, running)

            shared = SharedUnits(
                queue,
                units,
                self.folder.units_folder,
                running,
                self._owner(split),
                self._images_per_batch,
                lambda: interruption.requested,
                added,
            )
            flow = Flow(shared.batches(), self._images_per_batch, len(manifest) // self.ranks.size)
            encoded = tokens_of(
                self.model,
                source,
                manifest,
                flow,
                self.loaded,
                self.cache,
                workers=self.workers,
                note=self.reporter.note,
            )
            for batch in encoded:
                if len(batch.positions):
                    running.update(self._see(batch.tokens, batch.positions, manifest), batch.skipped)
                else:
                    running.skip(batch.skipped)
                shared.end_batch()
                if interruption.requested:
                    break
            if self.ranks.leads:
                self._save(split, running)
            if interruption.requested:
                raise interruption.stopped

    def _save(self, split: str, running: RunningSet) -> None:
        """Save the results of all finished work units; the file before is kept until the new one is complete."""
        if self.folder is None:
            return
        tensors, header = running.state()
        write_tensors(self.folder.state_file, tensors, STATE_SCHEMA, header | self._owner(split))
        self.saved = time.monotonic()


def _cut_batches(units: Sequence[WorkUnit], size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the manifest positions of each batch, and whether the batch is the last of its work unit."""
    for unit in units:
        for start in range(unit.start, unit.stop, size):
            yield np.arange(start, min(start + size, unit.stop)), start + size >= unit.stop
