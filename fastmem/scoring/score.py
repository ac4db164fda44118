"""The pass over the images: views, tokens, teacher-forced forward, responses, statistics; nothing is kept per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmem.backends.select import Backend, choose_backend
from fastmem.data.decoding import Skipped
from fastmem.data.loading import load_views
from fastmem.data.manifest import FOLDS, Manifest, WorkUnit
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.files import read_json, read_tensors, write_json, write_tensors
from fastmem.models.model import Model, to_unit_range
from fastmem.runs import Interruption, RunFolder, check_writable
from fastmem.scoring.class_order import check_class_order, check_labels
from fastmem.stats import StatsBuilder, UnitStats
from fastmem.stats.accumulators import LARGEST, Fold
from fastmem.stats.statistics import row_folder

STATE_SCHEMA = "fastmem.score-state/1"
SKIPPED_SCHEMA = "fastmem.skipped/1"
# views of one forward pass: at this size a GPU is full and a hidden layer of RAR-XXL takes half a gigabyte
BATCH_VIEWS = 80
UNIT_IMAGES = 64
SAVE_SECONDS = 30.0
# class rows above this size are summed up instead of kept
MAX_ROW_BYTES = 2 * 2**30
# of one unit and fold: mean and M2 in float64, the largest in float32; moments, views and largest responses with ids
ROW_BYTES = 20
FOLD_BYTES = 24 + 12 * LARGEST


@dataclass(frozen=True)
class ScoreSettings:
    """What determines the numbers of a scoring pass, besides model and data.

    views: a number, or "center"; segments: names; per_class: images of each class, None for all; batch_size: views of
    one forward pass; activation: "post" or "pre" (the GELU); class_rows: "auto", "keep" or "drop"; seed: of folds and
    of the images taken per class.
    """

    views: int | str = 10
    segments: tuple[str, ...] | None = None
    per_class: int | None = None
    batch_size: int = BATCH_VIEWS
    activation: str = "post"
    class_rows: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ("post", "pre"):
            raise UsageError(f"expected activation post or pre, got {self.activation!r}")
        if self.class_rows not in ("auto", "keep", "drop"):
            raise UsageError(f"expected class_rows auto, keep or drop, got {self.class_rows!r}")
        if self.batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1 view, got {self.batch_size}")
        if self.views != "center" and not (isinstance(self.views, int) and self.views >= 1):
            raise UsageError(f"expected views as a number of at least 1 or center, got {self.views!r}")


@dataclass(frozen=True)
class ScorePlan:
    """What a pass will take, told before it starts: images of both sets, views of each, bytes on disk."""

    images: int
    heldout_images: int
    views: int
    disk_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Reporter:
    """Whom a pass tells about itself; the defaults are silent.

    note: one sentence; planned: before the pass; advance: images done, from time to time.
    """

    note: Callable[[str], None] = field(default=lambda sentence: None)
    planned: Callable[[ScorePlan], None] = field(default=lambda plan: None)
    advance: Callable[[int], None] = field(default=lambda images: None)


@dataclass(frozen=True)
class ScoreResult:
    """What a scoring pass found.

    train, heldout: statistics of both sets, heldout None without one; skipped: images that could not be read, with
    reasons; seconds, images_per_second: of the pass in this process; run: the folder, None without one.
    """

    train: UnitStats
    heldout: UnitStats | None
    skipped: tuple[Skipped, ...]
    backend: str
    device: str
    seconds: float
    images_per_second: float
    run: Path | None


def responses(
    model: Model, tokens: Tensor, labels: Tensor, *, segments: Sequence[str] | None = None, backend: str = "auto"
) -> Tensor:
    """Mean absolute fc1 activation of every unit over each segment: float32 [N,layers,segments,units].

    tokens: int64 [N,T]; labels: int64 [N]; segments: names, the model's default ones when None.

    Raises: UsageError for an unknown segment or backend, or tokens and labels of another shape or range.

    Source: arXiv 2509.00488, section 3 (absolute activations, averaged over positions).
    """
    return model.responses(tokens, labels, segments, choose_backend(backend, model.device))


def score(
    model: Model,
    source: ImageSource,
    *,
    heldout: ImageSource | None = None,
    views: int | str = 10,
    segments: Sequence[str] | None = None,
    per_class: int | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    check_classes: bool = True,
    activation: str = "post",
    class_rows: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> ScoreResult:
    """Statistics of every unit's response to the images of ``source``, and to ``heldout`` where given.

    views: a number of views, or "center"; segments: names, the model's default ones when None; per_class: images of
    each class, drawn evenly, None for all; batch_size: views of one forward pass, rounded down to whole images (at
    least one); out: run folder, None keeps the result in memory; resume: go on in a run folder that was interrupted;
    check_classes: refuse data whose class order does not fit; activation: "post" (after the GELU) or "pre";
    class_rows: keep statistics per class, drop them, or "auto": keep them up to 2 GiB; workers: decoding processes.

    Raises: UsageError for options that do not fit model or data, a folder that cannot be written or holds another run;
    InputFileError for a damaged run folder. KeyboardInterrupt leaves a folder from which ``resume`` goes on.
    """
    settings = ScoreSettings(
        views, tuple(segments) if segments else None, per_class, batch_size or BATCH_VIEWS, activation, class_rows, seed
    )
    chosen = choose_backend(backend, model.device, pre_activation=activation == "pre")
    if out is not None:
        check_writable(Path(out))
    scorer = _Scorer(
        model, settings, chosen, RunFolder(Path(out)) if out is not None else None, reporter or Reporter(), workers
    )
    sets = {"train": source} | ({"heldout": heldout} if heldout is not None else {})
    return scorer.run(sets, resume, check_classes)


@dataclass
class _Scorer:
    model: Model
    settings: ScoreSettings
    backend: Backend
    folder: RunFolder | None
    reporter: Reporter
    workers: int | None

    def __post_init__(self) -> None:
        self.recipe = self.model.view_recipe(self.settings.views)
        self.segments = self.model.find_segments(self.settings.segments)
        self.shape = (self.model.num_layers, len(self.segments), self.model.num_units)
        self.skipped: dict[str, list[Skipped]] = {}
        self.saved = time.monotonic()

    def run(self, sets: dict[str, ImageSource], resume: bool, check_classes: bool) -> ScoreResult:
        manifests = {
            split: Manifest.build(source, self.settings.per_class, self.settings.seed) for split, source in sets.items()
        }
        for manifest in manifests.values():
            check_labels(self.model, manifest)
        if self.backend.missed:
            self.reporter.note(f"backend torch, because the faster one is missing: {self.backend.missed}")
        named, known = len(manifests["train"].classes), self.model.num_classes
        if named != known:
            self.reporter.note(
                f"the images name {named} classes and the checkpoint has {known}: labels are taken as positions in the "
                "images' class order, so a subset needs the checkpoint's whole order (--classes FILE)"
            )
        goes_on = self.folder is not None and self.folder.check(self._identity(manifests), resume)
        if check_classes and not goes_on:
            self._check_class_order(sets["train"], manifests["train"])
        if self.folder is not None and not goes_on:
            self.folder.start(self._identity(manifests))
        if self.folder is not None:
            for split, manifest in manifests.items():
                manifest.save(self.folder.manifest_file(split))
        self.reporter.planned(self._plan(sets["train"], manifests))
        started, images = time.monotonic(), 0
        stats: dict[str, UnitStats] = {}
        for split, source in sets.items():
            stats[split], done = self._score_set(split, source, manifests[split])
            images += done
        seconds = time.monotonic() - started
        if self.folder is not None:
            self.folder.state_file.unlink(missing_ok=True)
        skipped = [s for source in sets.values() for s in source.skipped]
        skipped += [s for split in sets for s in self.skipped[split]]
        return ScoreResult(
            stats["train"],
            stats.get("heldout"),
            tuple(skipped),
            self.backend.name,
            str(self.model.device),
            seconds,
            images / max(seconds, 1e-9),
            self.folder and self.folder.path,
        )

    def _identity(self, manifests: dict[str, Manifest]) -> dict[str, Any]:
        settings = asdict(self.settings) | {"segments": [s.name for s in self.segments]}
        return {
            "stage": "score",
            "model": self.model.name,
            **self.model.fingerprint(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "backend": self.backend.name,
            "recipe": self.recipe.name,
            "settings": settings,
            "manifests": {split: manifest.hash for split, manifest in manifests.items()},
        }

    def _origin(self, split: str, manifest: Manifest) -> dict[str, Any]:
        return {
            "set": split,
            "model": self.model.name,
            **self.model.fingerprint(),
            "manifest": manifest.hash,
            "views": self.recipe.name,
            "activation": self.settings.activation,
            "seed": self.settings.seed,
        }

    def _check_class_order(self, source: ImageSource, manifest: Manifest) -> None:
        losses = check_class_order(self.model, source, manifest)
        if losses is None:
            self.reporter.note("the class order is not checked: the images are all of one class")
        else:
            self.reporter.note(
                f"class order fits: {losses[0]:.3f} nats per token with own labels, {losses[1]:.3f} with shuffled ones"
            )

    def _row_bytes(self, manifest: Manifest) -> int:
        classes = len(np.unique(manifest.labels))
        return int(np.prod(self.shape)) * FOLDS * ROW_BYTES * classes

    def _keeps_rows(self, manifest: Manifest) -> bool:
        if self.settings.class_rows != "auto":
            return self.settings.class_rows == "keep"
        return self._row_bytes(manifest) <= MAX_ROW_BYTES

    def _plan(self, source: ImageSource, manifests: dict[str, Manifest]) -> ScorePlan:
        """The size of the pass; the time from one batch that is run and thrown away."""
        images = {split: len(manifest) for split, manifest in manifests.items()}
        disk = 0
        if self.folder is not None:
            disk = int(np.prod(self.shape)) * FOLDS * FOLD_BYTES * (len(manifests) + 1)
            disk += sum(self._row_bytes(m) for m in manifests.values() if self._keeps_rows(m))
        seconds = None
        probe = np.arange(min(self._images_per_batch, len(manifests["train"])))
        complete = self.folder is not None and all(self.folder.stats_file(split).exists() for split in manifests)
        if sum(images.values()) > 4 * len(probe) and not complete:
            (batch,) = load_views(source, manifests["train"], [probe], self.recipe, workers=0)
            if len(batch.positions):
                # the first call also allocates and chooses kernels, so the second is timed
                self._responses(batch.views[:1], manifests["train"].labels[batch.positions[:1]])
                started = time.monotonic()
                self._responses(batch.views, manifests["train"].labels[batch.positions])
                seconds = (time.monotonic() - started) / len(batch.positions) * sum(images.values())
        return ScorePlan(images["train"], images.get("heldout", 0), self.recipe.count, disk, seconds)

    @property
    def _images_per_batch(self) -> int:
        return max(1, self.settings.batch_size // self.recipe.count)

    def _responses(self, views: Tensor, labels: np.ndarray) -> Tensor:
        """Responses float32 [n,views,layers,segments,units] of views uint8 [n,views,S,S,3] under labels int64 [n]."""
        flat = views.flatten(0, 1)
        tokens = self.model.tokenize(to_unit_range(flat.to(self.model.device)))
        per_view = torch.from_numpy(labels).repeat_interleave(self.recipe.count)
        names = [s.name for s in self.segments]
        return self.model.responses(tokens, per_view, names, self.backend).view(
            len(views), self.recipe.count, *self.shape
        )

    def _score_set(self, split: str, source: ImageSource, manifest: Manifest) -> tuple[UnitStats, int]:
        """Statistics of one set, and how many images this process scored for it."""
        file = self.folder and self.folder.stats_file(split)
        if file is not None and file.exists():
            self.skipped[split] = self._read_skipped(split)
            self.reporter.advance(len(manifest))
            return UnitStats.load(file), 0
        keep_rows = self._keeps_rows(manifest)
        builder = StatsBuilder(
            self.shape,
            [s.name for s in self.segments],
            [s.name for s in self.segments if s.class_only],
            keep_rows,
            row_folder(file) if file and keep_rows else None,
            device=self.model.device,
        )
        units = manifest.work_units(UNIT_IMAGES)
        first = self._restore(split, builder)
        before = units[first - 1].stop if first else 0
        self.reporter.advance(before)
        self._score_units(split, source, manifest, units, first, builder)
        stats = builder.finish(self._origin(split, manifest))
        if file is not None:
            write_json(self._skipped_file(split), {"schema": SKIPPED_SCHEMA, "images": _as_rows(self.skipped[split])})
            stats.save(file)
        return stats, len(manifest) - before

    def _score_units(
        self,
        split: str,
        source: ImageSource,
        manifest: Manifest,
        units: list[WorkUnit],
        done: int,
        builder: StatsBuilder,
    ) -> None:
        """Score the units from number ``done`` on and fold them into the builder in order."""
        batches = list(_cut_batches(units[done:], self._images_per_batch))
        loaded = load_views(source, manifest, [positions for positions, _ in batches], self.recipe, self.workers)
        unit, skipped = builder.zero_unit(), []
        with Interruption() as interruption:
            for (positions, ends_unit), batch in zip(batches, loaded, strict=True):
                skipped += batch.skipped
                if len(batch.positions):
                    self._update_unit(unit, batch.views, manifest, batch.positions)
                if ends_unit:
                    builder.update(units[done].label, unit)
                    self.skipped[split] += skipped
                    done += 1
                    unit, skipped = builder.zero_unit(), []
                    if time.monotonic() - self.saved > SAVE_SECONDS:
                        self._save(split, builder, done)
                self.reporter.advance(len(positions))
                if interruption.requested:
                    self._save(split, builder, done)
                    raise KeyboardInterrupt
            self._save(split, builder, done)

    def _update_unit(self, unit: list[Fold], views: Tensor, manifest: Manifest, positions: np.ndarray) -> None:
        found = self._responses(views, manifest.labels[positions])
        ids, folds = torch.from_numpy(manifest.ids[positions]), manifest.fold[positions]
        for i in np.unique(folds):
            rows = torch.from_numpy(np.flatnonzero(folds == i))
            unit[i] = unit[i].update_by(self.backend.unit_update_, found[rows.to(found.device)], ids[rows])

    def _save(self, split: str, builder: StatsBuilder, done: int) -> None:
        """Checkpoint the statistics after ``done`` work units; the last checkpoint stays until this one is whole."""
        if self.folder is None:
            return
        tensors, header = builder.state()
        header |= {"set": split, "units": done, "skipped": _as_rows(self.skipped[split])}
        write_tensors(self.folder.state_file, tensors, STATE_SCHEMA, header)
        self.saved = time.monotonic()

    def _restore(self, split: str, builder: StatsBuilder) -> int:
        """Go on from the checkpoint where there is one of this set; returns the number of finished work units."""
        self.skipped[split] = []
        if self.folder is None or not self.folder.state_file.exists():
            return 0
        tensors, header = read_tensors(self.folder.state_file, STATE_SCHEMA)
        if header["set"] != split:
            return 0
        builder.restore(tensors, header)
        self.skipped[split] = [Skipped(**row) for row in header["skipped"]]
        return header["units"]

    def _skipped_file(self, split: str) -> Path:
        return self.folder.path / f"skipped-{split}.json"

    def _read_skipped(self, split: str) -> list[Skipped]:
        return [Skipped(**row) for row in read_json(self._skipped_file(split), SKIPPED_SCHEMA)["images"]]


def _as_rows(skipped: Sequence[Skipped]) -> list[dict[str, str]]:
    return [asdict(s) for s in skipped]


def _cut_batches(units: Sequence[WorkUnit], size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Manifest positions of each batch, and whether it is the last of its work unit."""
    for unit in units:
        for start in range(unit.start, unit.stop, size):
            yield np.arange(start, min(start + size, unit.stop)), start + size >= unit.stop
