"""The runs that are merged: opened, put in order, and checked to make one run together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import numpy as np

from fastmem.data.decoding import Skipped
from fastmem.data.manifest import Manifest
from fastmem.errors import InputFileError, UsageError
from fastmem.files import check_owner, read_json
from fastmem.runs.folder import RESULT_SCHEMA, RunFolder, RunInputs, run_id
from fastmem.scoring.score import SKIPPED_SCHEMA, SkippedShape
from fastmem.scoring.shard import Shard

# entries of an identity in which parts differ
OF_A_PART = ("schema", "manifests", "shard")


class ShardShape(TypedDict):
    """What run.json says of the slice that a run is of."""

    number: int
    of: int
    manifests: dict[str, str]


class DocumentShape(TypedDict):
    """The entries of result.json that are read again."""

    device: str
    seconds: float
    skipped_images: list[Skipped]


@dataclass(frozen=True, eq=False)
class Part:
    """A finished run that is merged with others.

    Attributes:
        folder: where it lies.
        identity: what run.json says.
        shard: the slice that it is of; None for a run over all of its images.
        inputs: where its weights and images came from.
        manifests: its images by set.
        document: what result.json says.
    """

    folder: RunFolder
    identity: dict[str, Any]
    shard: Shard | None
    inputs: RunInputs
    manifests: dict[str, Manifest]
    document: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Part:
        """Open a run. Raises: InputFileError where it is missing, unfinished or damaged."""
        folder = RunFolder(path)
        identity = folder.finished_identity()
        shard = None
        if "shard" in identity:
            try:
                found = msgspec.convert(identity["shard"], ShardShape)
                shard = Shard(found["number"], found["of"])
            except (msgspec.ValidationError, UsageError) as error:
                raise InputFileError(
                    f"expected the number of a shard in {folder.identity_file}, got others ({error}): score again"
                ) from error
        if "train" not in identity["manifests"] or identity["manifests"].keys() - {"train", "heldout"}:
            named = ", ".join(identity["manifests"]) or "none"
            raise InputFileError(
                f"expected the sets train and heldout in {folder.identity_file}, got {named}: score again"
            )
        manifests = {split: Manifest.load(folder.manifest_file(split)) for split in identity["manifests"]}
        for split, manifest in manifests.items():
            check_owner(
                {"manifest": manifest.hash}, folder.manifest_file(split), {"manifest": identity["manifests"][split]}
            )
        inputs = RunInputs.load(folder, run_id(identity))
        document = read_json(folder.result_file, RESULT_SCHEMA, DocumentShape)
        return cls(folder, identity, shard, inputs, manifests, document)

    @property
    def id(self) -> str:
        """What tells the run from others."""
        return run_id(self.identity)

    @property
    def skipped(self) -> list[Skipped]:
        """All images that were left out."""
        return [Skipped(row["name"], row["reason"]) for row in self.document["skipped_images"]]

    def skipped_in(self, split: str) -> list[Skipped]:
        """Images of a set that could not be read. Raises: InputFileError where the list is missing or damaged."""
        owner = {"run": self.id, "set": split}
        document = read_json(self.folder.skipped_file(split), SKIPPED_SCHEMA, SkippedShape, owner)
        return [Skipped(row["name"], row["reason"]) for row in document["images"]]

    def __str__(self) -> str:
        return str(self.folder.path)


def open_parts(paths: Sequence[Path]) -> list[Part]:
    """Open runs that are to be merged, and return them in an order that does not depend on that of ``paths``.

    Raises: UsageError for runs that do not make one: of other settings, weights or classes, a shard that is missing, or
    an image that is in two of them; InputFileError where a run is missing, unfinished or damaged.
    """
    parts = [Part.open(path) for path in paths]
    if not parts or (len(parts) == 1 and parts[0].shard is None):
        raise UsageError(f"expected at least two runs to merge, got {len(parts)}: name the folder of each")
    first = parts[0]
    for other in parts[1:]:
        _check_settings(first, other)
        if (first.shard is None) != (other.shard is None):
            shard, whole = (first, other) if first.shard is not None else (other, first)
            raise UsageError(
                f"expected shards alone or none, got {shard.shard} in {shard} and a run that is no shard in {whole}: "
                "merge the shards first"
            )
    if first.shard is None:
        parts = sorted(parts, key=lambda part: part.id)
        _check_runs(parts)
    else:
        parts = sorted(parts, key=lambda part: (0, 0) if part.shard is None else (part.shard.of, part.shard.number))
        _check_shards(parts)
    _check_classes(parts)
    for split in ("train", "heldout"):
        _check_disjoint(parts, split)
    return parts


def _check_settings(one: Part, other: Part) -> None:
    mine, theirs = ({k: v for k, v in part.identity.items() if k not in OF_A_PART} for part in (one, other))
    for key in {**mine, **theirs}:
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            key, a, b = next(((k, a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)), (key, None, None))
        if a != b:
            raise UsageError(
                f"expected runs of equal {key}, got {_short(a)} in {one} and {_short(b)} in {other}: merge runs of one "
                "model and setting"
            )


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:24]


def _check_classes(parts: Sequence[Part]) -> None:
    """Check that a label stands for the same class everywhere; some may name fewer classes than others."""
    longest = max(parts, key=lambda part: len(part.manifests["train"].classes))
    classes = longest.manifests["train"].classes
    for part in parts:
        for manifest in part.manifests.values():
            if manifest.classes != classes[: len(manifest.classes)]:
                label = next(
                    i for i, pair in enumerate(zip(manifest.classes, classes, strict=False)) if pair[0] != pair[1]
                )
                raise UsageError(
                    f"expected runs of one class order, got {manifest.classes[label]} as class {label} in {part} and "
                    f"{classes[label]} in {longest}: score both with the same --classes FILE"
                )


def _check_runs(parts: Sequence[Part]) -> None:
    for one, other in zip(parts, parts[1:], strict=False):
        if one.id == other.id:
            raise UsageError(f"expected every run once, got the same run in {one} and {other}: leave one out")
        if one.manifests.keys() != other.manifests.keys():
            sides = [" and ".join(part.manifests) for part in (one, other)]
            raise UsageError(
                f"expected runs of the same sets, got {sides[0]} in {one} and {sides[1]} in {other}: score both with "
                "--heldout, or neither"
            )


def _check_shards(parts: Sequence[Part]) -> None:
    first = parts[0]
    assert first.shard is not None
    whole = first.identity["shard"]["manifests"]
    for one, other in zip(parts, parts[1:], strict=False):
        assert one.shard is not None
        assert other.shard is not None
        if one.shard.of != other.shard.of:
            raise UsageError(
                f"expected shards of one job, got {one.shard} in {one} and {other.shard} in {other}: merge each job's "
                "shards alone"
            )
        theirs = other.identity["shard"]["manifests"]
        for split in {**whole, **theirs}:
            if whole.get(split) != theirs.get(split):
                raise UsageError(
                    f"expected shards of the same {split} images, got {_short(whole.get(split))} in {first} and "
                    f"{_short(theirs.get(split))} in {other}: score all shards with the same images"
                )
        if one.shard == other.shard:
            raise UsageError(f"expected every shard once, got {one.shard} in {one} and {other}: leave one out")
    there = {part.shard.number for part in parts if part.shard is not None}
    missing = [number for number in range(1, first.shard.of + 1) if number not in there]
    if missing:
        named = ", ".join(map(str, missing[:8])) + f" and {len(missing) - 8} more" * (len(missing) > 8)
        raise UsageError(
            f"expected all {first.shard.of} shards of the job, got {first.shard} in {first} and none of {named}: "
            "score those and name their runs too"
        )


def _check_disjoint(parts: Sequence[Part], split: str) -> None:
    having = [part for part in parts if split in part.manifests]
    if not having:
        return
    ids = np.concatenate([part.manifests[split].ids for part in having])
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if not len(twice):
        return
    ends = np.cumsum([len(part.manifests[split]) for part in having])
    one, other = (having[int(np.searchsorted(ends, order[twice[0] + i], "right"))] for i in (0, 1))
    manifest = one.manifests[split]
    name = manifest.names[np.flatnonzero(manifest.ids == ids[order[twice[0]]])[0]]
    raise UsageError(
        f"expected runs without a {split} image in common, got {name} in {one} and {other}: merge runs over different "
        "images"
    )


def as_paths(runs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the folders of runs. Raises: UsageError for a single path, whose letters would be taken for paths."""
    if isinstance(runs, str | os.PathLike):
        raise UsageError(f"expected a list of runs, got the path {os.fspath(runs)!r}: put it into a list with others")
    return [Path(run) for run in runs]
