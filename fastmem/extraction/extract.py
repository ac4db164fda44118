"""Extract training images: attack the candidates of the training set and of the held-out set, and judge the results.

The candidates are attacked in work units, each with all candidates of a few classes of one set. Every finished unit is
saved to a file, so a run that was interrupted is resumed with the units that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.errors import UsageError
from fastmem.extraction.attack import BATCH_ROWS, attack, token_match
from fastmem.extraction.candidates import (
    TOP_PER_CLASS,
    Targets,
    find_targets,
    highest_per_class,
    read_pictures,
    targets_of,
)
from fastmem.extraction.verdicts import (
    Judge,
    SSCDJudge,
    cosines,
    distinct,
    false_alarm_threshold,
    groups_by_cosine,
    groups_by_tokens,
)
from fastmem.files import check_finite, check_tensors, read_tensors, write_tensors
from fastmem.index.embedding import embed
from fastmem.index.search import EmbeddingIndex
from fastmem.models.model import Model
from fastmem.reporter import SILENT, Reporter
from fastmem.runs.interruption import Interruption
from fastmem.tokens.cache import TokenCache

UNIT_SCHEMA = "fastmem.extraction-unit/1"
# least number of targets in a work unit, except in the last one
UNIT_TARGETS = 32


@dataclass(frozen=True)
class ExtractPlan:
    """The amount of work of an extraction.

    Attributes:
        targets: number of images to attack, of both sets together.
        completions: number of images to generate, one for each target and prefix length.
        judge: name of the judge.
        threshold: a target counts as extracted when its similarity is above this.
        things: plural noun for what is counted.
    """

    targets: int
    completions: int
    judge: str
    threshold: float
    things: str = "candidates"

    @property
    def total(self) -> int:
        """Number of images to attack."""
        return self.targets

    def __str__(self) -> str:
        return (
            f"{self.targets:,} candidates, {self.completions:,} completions, judged by {self.judge} above "
            f"{self.threshold}"
        )


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The completions of the N targets of one set from P prefix lengths, and how similar they are to their targets.

    Attributes:
        targets: the images that were attacked.
        candidate: bool [N], whether a target is a candidate of the whole set.
        matched: bool [N], whether a target is a candidate of the part of the set that matches the held-out set.
        prefixes: the P prefix lengths, in tokens.
        threshold: a target counts as extracted when its similarity is above this.
        tokens: the completions, int64 [P,N,T].
        match: share of correct tokens after the prefix, float64 [P,N].
        similarity: similarity of the completion and the tokenizer's reconstruction of the target, float32 [P,N];
            without an embedder the same as ``match``.
        original: similarity of the completion and the image itself (its centre view), float32 [P,N]; NaN without an
            embedder.
        ceiling: similarity of the reconstruction and the image itself, float32 [N]; NaN without an embedder.
        nearest: id of the training image most similar to the completion, int64 [P,N]; -1 without an index.
        nearest_similarity: similarity of the completion and that image, float32 [P,N]; NaN without an index.
        twin_similarity: similarity of the target and the most similar other training image, float32 [N]; NaN without an
            index.
        groups: number of the near-duplicate group of each target, int64 [N].
    """

    targets: Targets
    candidate: np.ndarray
    matched: np.ndarray
    prefixes: tuple[int, ...]
    threshold: float
    tokens: Tensor
    match: np.ndarray
    similarity: np.ndarray
    original: np.ndarray
    ceiling: np.ndarray
    nearest: np.ndarray
    nearest_similarity: np.ndarray
    twin_similarity: np.ndarray
    groups: np.ndarray

    @property
    def extracted(self) -> np.ndarray:
        """Whether the completion's similarity to the reconstruction is above the threshold, bool [P,N]."""
        return self.similarity > self.threshold

    @property
    def extracted_original(self) -> np.ndarray:
        """Whether the completion's similarity to the image itself is above the threshold, bool [P,N]."""
        return self.original > self.threshold

    def distinct(self, prefix: int) -> int:
        """Return how many near-duplicate groups hold a candidate extracted from the prefix at position ``prefix``."""
        return distinct(self.extracted[prefix] & self.candidate, self.groups)


@dataclass(frozen=True, eq=False)
class Extraction:
    """The result of an extraction.

    Attributes:
        sets: verdicts on the candidates by set, "train" and "heldout".
        prefixes: prefix lengths, in tokens.
        threshold: a target counts as extracted when its similarity is above this.
        judge: name of the judge.
        index: folder of the index in which completions were searched; None where none was searched.
        seconds: duration of this call.
    """

    sets: dict[str, Verdicts]
    prefixes: tuple[int, ...]
    threshold: float
    judge: str
    index: str | None
    seconds: float

    def false_alarm_thresholds(self) -> list[float | None]:
        """Return for each prefix length the smallest similarity that at most 1 % of the held-out candidates are above.

        An entry is None where there are no held-out candidates.
        """
        if "heldout" not in self.sets:
            return [None] * len(self.prefixes)
        heldout = self.sets["heldout"]
        return [false_alarm_threshold(row[heldout.candidate]) for row in heldout.similarity]


def extract(
    model: Model,
    sources: Mapping[str, ImageSource],
    manifests: Mapping[str, Manifest],
    scores: Mapping[str, np.ndarray],
    judge: Judge,
    *,
    index: EmbeddingIndex | None = None,
    prefixes: Sequence[int] | None = None,
    top_per_class: int = TOP_PER_CLASS,
    matched: np.ndarray | None = None,
    without: np.ndarray | None = None,
    folder: Path | None = None,
    batch_size: int = BATCH_ROWS,
    cache: TokenCache | None = None,
    workers: int | None = None,
    reporter: Reporter = SILENT,
) -> Extraction:
    """Attack the candidates of the set "train" and, where given, of the set "heldout", and judge their completions.

    Args:
        model: the model, edited or not.
        sources: images by set.
        manifests: order of the images by set.
        scores: candidate scores of all images by set, float [N] in manifest order.
        judge: measures how similar completions and their targets are.
        index: index of the training set, in which every completion is searched; None searches nothing.
        prefixes: prefix lengths, in tokens; None for the model's own list.
        top_per_class: number of candidates of every class.
        matched: bool [N], which training images match the held-out set; candidates are chosen among these, too, so that
            the candidates of both sets are chosen from equally many images. None where all training images match.
        without: ids of candidates to leave out, int64 [m], because the model's edit was chosen on them; None for none.
        folder: where finished work units are saved, and read when a run is resumed; None saves nothing.
        batch_size: number of completions computed at once.
        cache: where the targets' tokens are looked up; None for no cache.
        workers: number of processes that decode images; None chooses by cores and number of images.
        reporter: is given the plan, the number of targets done, and notes on what was left out.

    Raises: UsageError where a prefix length is not allowed, no image can be read, or another embedder made the index;
    InputFileError where a saved unit is damaged; KeyboardInterrupt on Ctrl-C, after the current unit was saved.
    """
    lengths = tuple(model.prefixes if prefixes is None else prefixes)
    check_prefixes(model, lengths)
    if index is not None and isinstance(judge, SSCDJudge):
        index.check_embedder(judge.embedder)
    started = time.monotonic()
    chosen = {split: highest_per_class(manifest, scores[split], top_per_class) for split, manifest in manifests.items()}
    also = np.empty(0, np.int64)
    if matched is not None and "heldout" in manifests:
        also = highest_per_class(manifests["train"], np.where(matched, scores["train"], np.nan), top_per_class)
    if without is not None and len(without):
        left = ~np.isin(manifests["train"].ids[chosen["train"]], without)
        reporter.note(
            f"{(~left).sum():,} of {len(left):,} candidates are left out, because the edit was chosen on them"
        )
        chosen["train"] = chosen["train"][left]
        also = also[~np.isin(manifests["train"].ids[also], without)]
    wanted = {split: np.union1d(at, also) if split == "train" else at for split, at in chosen.items()}
    total = sum(map(len, wanted.values()))
    reporter.planned(ExtractPlan(total, total * len(lengths), judge.name, judge.threshold))
    stage = _Stage(model, judge, index, lengths, folder, batch_size, cache, workers, reporter)
    sets = {}
    for split, positions in wanted.items():
        manifest = manifests[split]
        parts = stage.run(split, sources[split], manifest, scores[split], positions)
        ids = {"candidate": manifest.ids[chosen[split]]}
        ids["matched"] = manifest.ids[also] if split == "train" and len(also) else ids["candidate"]
        sets[split] = _join(parts, ids, lengths, judge)
    name = None if index is None else str(index.path)
    return Extraction(sets, lengths, judge.threshold, judge.name, name, time.monotonic() - started)


def check_prefixes(model: Model, prefixes: Sequence[int]) -> None:
    """Check that prefix lengths, in tokens, are different, allowed by the model and shorter than an image.

    Raises: UsageError where they are not, or where there are none.
    """
    allowed = [length for length in model.prefix_lengths if length < model.num_tokens]
    wrong = [length for length in prefixes if length not in allowed]
    if wrong or not prefixes or len(set(prefixes)) < len(prefixes):
        shown = ", ".join(map(str, allowed)) if len(allowed) <= 12 else f"0 to {allowed[-1]}"
        got = f"{wrong[0]}" if wrong else ", ".join(map(str, prefixes)) or "none"
        raise UsageError(f"expected different prefix lengths out of {shown} tokens, got {got}")


# dtypes and shapes of the tensors of a work unit's file
PART_TENSORS = {
    "ids": ("int64", ("N",)),
    "true": ("int64", ("N", "T")),
    "tokens": ("int64", ("P", "N", "T")),
    "match": ("float64", ("P", "N")),
    "similarity": ("float32", ("P", "N")),
    "original": ("float32", ("P", "N")),
    "ceiling": ("float32", ("N",)),
    "nearest": ("int64", ("P", "N")),
    "nearest_similarity": ("float32", ("P", "N")),
    "twin_similarity": ("float32", ("N",)),
    "vectors": ("float32", ("N", "D")),
}


@dataclass(frozen=True, eq=False)
class _Part:
    """The verdicts on the targets of one work unit; fields have the names and shapes of those of `Verdicts`."""

    ids: Tensor
    true: Tensor
    tokens: Tensor
    match: Tensor
    similarity: Tensor
    original: Tensor
    ceiling: Tensor
    nearest: Tensor
    nearest_similarity: Tensor
    twin_similarity: Tensor
    vectors: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def read(cls, file: Path, owner: Mapping[str, Any]) -> _Part:
        """Read a work unit from its file. Raises: InputFileError where it is damaged or another one's."""
        tensors, _ = read_tensors(file, UNIT_SCHEMA, owner=owner)
        check_tensors(file, tensors, PART_TENSORS)
        # what was not measured is NaN elsewhere
        check_finite(file, {name: tensors[name] for name in ("match", "similarity")})
        return cls(**{name: tensors[name] for name in PART_TENSORS})


@dataclass
class _Stage:
    """The model, the settings and the folder that all work units of an extraction share."""

    model: Model
    judge: Judge
    index: EmbeddingIndex | None
    prefixes: tuple[int, ...]
    folder: Path | None
    batch_size: int
    cache: TokenCache | None
    workers: int | None
    reporter: Reporter

    def run(
        self, split: str, source: ImageSource, manifest: Manifest, scores: np.ndarray, positions: np.ndarray
    ) -> list[tuple[Targets, _Part]]:
        """Return the targets and verdicts of every work unit of a set, read from its file where it is finished."""
        done = []
        owner = {"set": split, "manifest": manifest.hash, "judge": self.judge.name, **self.model.fingerprint()}
        with Interruption() as interruption:
            for number, at in enumerate(_cut(manifest.labels[positions])):
                file = None if self.folder is None else self.folder / f"{split}-{number:05d}.safetensors"
                unit = positions[at]
                if file is not None and file.exists():
                    part = _Part.read(file, owner | {"unit": number})
                    targets = targets_of(manifest, scores, unit, part.ids.numpy(), part.true)
                else:
                    targets = find_targets(
                        self.model, source, manifest, scores, unit, cache=self.cache, workers=self.workers
                    )
                    if len(targets) < len(unit):
                        self.reporter.note(f"{len(unit) - len(targets)} of {len(unit)} {split} images cannot be read")
                    part = self._judge(targets, source, manifest)
                    if file is not None:
                        write_tensors(file, part.tensors(), UNIT_SCHEMA, owner | {"unit": number})
                done.append((targets, part))
                self.reporter.advance(len(unit))
                if interruption.requested:
                    raise interruption.stopped
        return done

    def _judge(self, targets: Targets, source: ImageSource, manifest: Manifest) -> _Part:
        """Attack the targets of one work unit and judge their completions."""
        generated = attack(self.model, targets, self.prefixes, batch_size=self.batch_size)
        similarity = self.judge.similarities(self.model, targets, self.prefixes, generated)
        match = token_match(targets.tokens, self.prefixes, generated)
        count, shape = len(targets), similarity.shape
        original, ceiling, twin = (
            np.full(shape, np.nan, "f4"),
            np.full(count, np.nan, "f4"),
            np.full(count, np.nan, "f4"),
        )
        nearest, nearest_similarity = np.full(shape, -1, np.int64), np.full(shape, np.nan, "f4")
        vectors = np.empty((count, 0), np.float32)
        if isinstance(self.judge, SSCDJudge) and count:
            vectors = embed(self.judge.embedder, read_pictures(self.model, source, manifest, targets))
            made = self.judge.vectors(self.model, generated.flatten(0, 1)).reshape(*shape, -1)
            original = cosines(made, vectors)
            ceiling = cosines(self.judge.vectors(self.model, targets.tokens), vectors)
            if self.index is not None:
                found = self.index.search(made.reshape(-1, made.shape[-1]), 1)
                nearest, nearest_similarity = found.ids.reshape(shape), found.cosines.reshape(shape)
                twin = self._nearest_other(self.index, targets, vectors)
        arrays = (original, ceiling, nearest, nearest_similarity, twin, vectors)
        return _Part(
            torch.from_numpy(targets.ids),
            targets.tokens,
            generated,
            match,
            torch.from_numpy(similarity),
            *map(torch.from_numpy, arrays),
        )

    def _nearest_other(self, index: EmbeddingIndex, targets: Targets, vectors: np.ndarray) -> np.ndarray:
        """Return the cosine of each target and the nearest training image other than itself, float32 [N]."""
        found = index.search(vectors, min(2, len(index)))
        itself = found.ids == targets.ids[:, None]
        return np.where(itself, -np.inf, found.cosines).max(1).astype(np.float32)


def _cut(labels: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each work unit's targets; a unit has whole classes with at least UNIT_TARGETS targets."""
    units, start = [], 0
    for stop in [*(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]:
        if stop - start >= UNIT_TARGETS or (stop == len(labels) and stop > start):
            units.append(np.arange(start, stop))
            start = stop
    return units


def _join(
    parts: Sequence[tuple[Targets, _Part]], ids: Mapping[str, np.ndarray], prefixes: tuple[int, ...], judge: Judge
) -> Verdicts:
    """Join the work units of a set; ``ids`` holds the image ids of its candidates and of its matched candidates."""
    if not parts:
        raise UsageError("expected at least one candidate, got none: not one image could be read")
    targets = [t for t, _ in parts]
    joined = Targets(
        np.concatenate([t.ids for t in targets]),
        np.concatenate([t.labels for t in targets]),
        tuple(name for t in targets for name in t.names),
        np.concatenate([t.scores for t in targets]),
        torch.cat([t.tokens for t in targets]),
    )

    def along(name: str) -> np.ndarray:
        arrays = [getattr(part, name) for _, part in parts]
        return torch.cat(arrays, dim=arrays[0].ndim - 1 if name not in ("tokens", "vectors") else 0).numpy()

    groups = (
        groups_by_cosine(along("vectors"), judge.threshold)
        if isinstance(judge, SSCDJudge)
        else groups_by_tokens(joined.tokens, judge.threshold)
    )
    return Verdicts(
        targets=joined,
        candidate=np.isin(joined.ids, ids["candidate"]),
        matched=np.isin(joined.ids, ids["matched"]),
        prefixes=prefixes,
        threshold=judge.threshold,
        tokens=torch.cat([part.tokens for _, part in parts], dim=1),
        match=along("match"),
        similarity=along("similarity"),
        original=along("original"),
        ceiling=along("ceiling"),
        nearest=along("nearest"),
        nearest_similarity=along("nearest_similarity"),
        twin_similarity=along("twin_similarity"),
        groups=groups,
    )
