"""The stage: candidates of a training set and of a matched held-out set are attacked, and every completion judged.

A work unit is some whole classes of one set; its file is a pure function of model, images and settings, so a run that
was killed goes on with the units it lacks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

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
from fastmem.files import read_tensors, write_tensors
from fastmem.index.embedding import embed
from fastmem.index.search import EmbeddingIndex
from fastmem.models.model import Model
from fastmem.reporter import SILENT, Reporter
from fastmem.runs.interruption import Interruption
from fastmem.tokens.cache import TokenCache

UNIT_SCHEMA = "fastmem.extraction-unit/1"
UNIT_TARGETS = 32


@dataclass(frozen=True)
class ExtractPlan:
    """What the stage will take.

    Attributes:
        targets: images to be pulled out, of both sets.
        completions: generations, one for each target and prefix.
        judge: the name of who decides.
        threshold: a completion that is more alike its target than this counts as extracted.
    """

    targets: int
    completions: int
    judge: str
    threshold: float
    things: str = "candidates"

    @property
    def total(self) -> int:
        """Images to be pulled out."""
        return self.targets

    def __str__(self) -> str:
        return (
            f"{self.targets:,} candidates, {self.completions:,} completions, judged by {self.judge} above "
            f"{self.threshold}"
        )


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What came back for the N targets of one set from P prefixes.

    Attributes:
        targets: the images.
        candidate: bool [N], which of them are candidates of the whole set.
        matched: bool [N], which of them are candidates of the part that matches the held-out set.
        prefixes: lengths in tokens.
        threshold: a completion that is more alike its target than this counts as extracted.
        tokens: completions, int64 [P,N,T].
        match: share of right tokens after the prefix, float64 [P,N].
        similarity: of the completion with the tokenizer's reconstruction of the target, float32 [P,N]; without an
            embedder this is the match.
        original: of the completion with the image as the model sees it (its centre view), float32 [P,N]; NaN without an
            embedder.
        ceiling: of the reconstruction with that view, float32 [N]; NaN without an embedder.
        nearest: id of the training image nearest to the completion, int64 [P,N]; -1 without an index.
        nearest_similarity: its similarity, float32 [P,N]; NaN without an index.
        twin_similarity: of the target with the nearest other training image, float32 [N]; NaN without an index.
        groups: numbers of near-duplicate groups of targets, int64 [N].
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
        """Which completions are more alike the reconstruction than the threshold, bool [P,N]."""
        return self.similarity > self.threshold

    @property
    def extracted_original(self) -> np.ndarray:
        """Which completions are more alike the image than the threshold, bool [P,N]."""
        return self.original > self.threshold

    def distinct(self, prefix: int) -> int:
        """Groups of near-duplicate candidates of which one was extracted with the prefix at this position."""
        return distinct(self.extracted[prefix] & self.candidate, self.groups)


@dataclass(frozen=True, eq=False)
class Extraction:
    """The verdicts on both sets, by "train" and "heldout", and what they were reached with."""

    sets: dict[str, Verdicts]
    prefixes: tuple[int, ...]
    threshold: float
    judge: str
    index: str | None
    seconds: float

    def false_alarm_thresholds(self) -> list[float | None]:
        """For each prefix the threshold that at most 1 % of the held-out candidates exceed; None without them."""
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
    """Attack the candidates of the set "train" and, where there is one, "heldout", and judge what comes back.

    Args:
        model: the model, edited or not.
        sources: images by set.
        manifests: their order by set.
        scores: candidate scores of every image, float [N] in manifest order, by set.
        judge: who decides how alike a completion and its target are.
        index: of the training set, in which every completion is searched; None searches nothing.
        prefixes: lengths in tokens; None takes the model's ladder.
        top_per_class: how many candidates of every class.
        matched: training images that match the held-out set, bool [N]; candidates are chosen among them too, so that
            both sides are chosen from equally many images. None where all of them match.
        without: ids of candidates that are left out after the choice, because an edit was chosen on them.
        folder: where finished work units lie, from which an interrupted run goes on; None keeps them in memory.
        batch_size: rows of tokens that are completed at once.
        cache: where the targets' tokens are looked up.
        workers: processes that decode images, as in ``load_views``.
        reporter: is told the plan, targets that are done, and what a person should know.

    Raises: UsageError for a prefix that the model does not allow, or an index of another embedder; InputFileError for a
    damaged unit. KeyboardInterrupt keeps the units that were finished.
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
    """Raises: UsageError where a prefix is not one the model allows, is everything, or comes twice."""
    allowed = [length for length in model.prefix_lengths if length < model.num_tokens]
    wrong = [length for length in prefixes if length not in allowed]
    if wrong or not prefixes or len(set(prefixes)) < len(prefixes):
        shown = ", ".join(map(str, allowed)) if len(allowed) <= 12 else f"0 to {allowed[-1]}"
        got = f"{wrong[0]}" if wrong else ", ".join(map(str, prefixes)) or "none"
        raise UsageError(f"expected different prefix lengths out of {shown} tokens, got {got}")


@dataclass(frozen=True, eq=False)
class _Part:
    """The verdicts on one work unit; fields as in Verdicts."""

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


@dataclass
class _Stage:
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
        """The parts of every work unit of a set, from its file where it is done."""
        done = []
        with Interruption() as interruption:
            for number, at in enumerate(_cut(manifest.labels[positions])):
                file = None if self.folder is None else self.folder / f"{split}-{number:05d}.safetensors"
                unit = positions[at]
                if file is not None and file.exists():
                    part = _Part(**read_tensors(file, UNIT_SCHEMA)[0])
                    targets = targets_of(manifest, scores, unit, part.ids.numpy(), part.true)
                else:
                    targets = find_targets(
                        self.model, source, manifest, scores, unit, cache=self.cache, workers=self.workers
                    )
                    if len(targets) < len(unit):
                        self.reporter.note(f"{len(unit) - len(targets)} of {len(unit)} {split} images cannot be read")
                    part = self._judge(split, targets, source, manifest)
                    if file is not None:
                        write_tensors(file, part.tensors(), UNIT_SCHEMA, {})
                done.append((targets, part))
                self.reporter.advance(len(unit))
                if interruption.requested:
                    raise KeyboardInterrupt
        return done

    def _judge(self, split: str, targets: Targets, source: ImageSource, manifest: Manifest) -> _Part:
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
                twin = self._nearest_other(split, targets, vectors)
        arrays = (original, ceiling, nearest, nearest_similarity, twin, vectors)
        return _Part(
            torch.from_numpy(targets.ids),
            targets.tokens,
            generated,
            match,
            torch.from_numpy(similarity),
            *map(torch.from_numpy, arrays),
        )

    def _nearest_other(self, split: str, targets: Targets, vectors: np.ndarray) -> np.ndarray:
        """Cosine of each target with the nearest training image that is not itself, float32 [N]."""
        found = self.index.search(vectors, min(2, len(self.index)))
        itself = found.ids == targets.ids[:, None]
        return np.where(itself, -np.inf, found.cosines).max(1).astype(np.float32)


def _cut(labels: np.ndarray) -> list[np.ndarray]:
    """Positions of work units: whole classes, in order, of together at least UNIT_TARGETS targets."""
    units, start = [], 0
    for stop in [*(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]:
        if stop - start >= UNIT_TARGETS or (stop == len(labels) and stop > start):
            units.append(np.arange(start, stop))
            start = stop
    return units


def _join(
    parts: Sequence[tuple[Targets, _Part]], ids: Mapping[str, np.ndarray], prefixes: tuple[int, ...], judge: Judge
) -> Verdicts:
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

    by_vectors = isinstance(judge, SSCDJudge)
    groups = (
        groups_by_cosine(along("vectors"), judge.threshold)
        if by_vectors
        else groups_by_tokens(joined.tokens, judge.threshold)
    )
    return Verdicts(
        joined,
        np.isin(joined.ids, ids["candidate"]),
        np.isin(joined.ids, ids["matched"]),
        prefixes,
        judge.threshold,
        torch.cat([part.tokens for _, part in parts], dim=1),
        *(
            along(name)
            for name in (
                "match",
                "similarity",
                "original",
                "ceiling",
                "nearest",
                "nearest_similarity",
                "twin_similarity",
            )
        ),
        groups,
    )
