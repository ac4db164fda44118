"""Several finished runs as one: the shards of a job, or runs over different images with equal model and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from fastmem.data.decoding import Skipped
from fastmem.data.manifest import Manifest
from fastmem.errors import InputFileError, UsageError
from fastmem.files import read_json, write_json
from fastmem.runs.folder import SEVERAL, RunFolder, RunInputs, run_id
from fastmem.scoring.image_losses import ImageLosses
from fastmem.scoring.parts import OF_A_PART, Part
from fastmem.scoring.score import SKIPPED_SCHEMA, ScoreResult, SkippedShape
from fastmem.stats import UnitStats


@dataclass(frozen=True, eq=False)
class Whole:
    """What the parts are together.

    Attributes:
        parts: the runs.
        identity: what run.json says; of shards, the very words of a run that was scored in one piece.
        manifests: the images by set.
        orders: by set, where each of these images was in the concatenated parts, int64 [N].
    """

    parts: list[Part]
    identity: dict[str, Any]
    manifests: dict[str, Manifest]
    orders: dict[str, np.ndarray]

    @classmethod
    def of(cls, parts: list[Part]) -> Whole:
        """Put the manifests of parts together.

        Raises: InputFileError where shards do not make the images that they say.
        """
        sets = [split for split in ("train", "heldout") if any(split in part.manifests for part in parts)]
        joined = {split: Manifest.join(_having(parts, split)) for split in sets}
        manifests = {split: found[0] for split, found in joined.items()}
        hashes = {split: manifest.hash for split, manifest in manifests.items()}
        if parts[0].shard is not None and hashes != parts[0].identity["shard"]["manifests"]:
            raise InputFileError(
                f"expected the images that {parts[0]} names in all shards together, got others: score the shards again"
            )
        identity = {k: v for k, v in parts[0].identity.items() if k not in OF_A_PART} | {"manifests": hashes}
        return cls(parts, identity, manifests, {split: joined[split][1] for split in manifests})

    @property
    def inputs(self) -> RunInputs:
        """Where later stages find weights and images; shards name one place of the same images, the first one's."""
        first = self.parts[0].inputs
        if self.parts[0].shard is not None:
            return first
        # the weights are the same wherever they lie
        several: dict[str, Any] = {}
        for place, below in (("data", "data_split"), ("heldout", "heldout_split")):
            if len({(getattr(part.inputs, place), getattr(part.inputs, below)) for part in self.parts}) > 1:
                several |= {place: SEVERAL, below: None}
        return replace(first, **several)

    def write(self, folder: RunFolder, advance: Callable[[int], None]) -> None:
        """Write everything but tables, pictures and result.json into a folder; ``advance`` is told of parts done.

        Raises: UsageError where the folder cannot be written, or runs without class rows have a class in common;
        InputFileError where a part is damaged.
        """
        run = run_id(self.identity)
        folder.start(self.identity)
        self.inputs.save(folder, run)
        for split, manifest in self.manifests.items():
            owner = {"run": run, "set": split}
            manifest.save(folder.manifest_file(split))
            having = [part for part in self.parts if split in part.manifests]
            skipped = list(chain.from_iterable(part.skipped_in(split) for part in having))
            place = {str(name): i for i, name in enumerate(manifest.names)} if skipped else {}
            rows = [asdict(s) for s in sorted(skipped, key=lambda s: (place.get(s.name, len(place)), s.name))]
            write_json(folder.skipped_file(split), {"schema": SKIPPED_SCHEMA, **owner, "images": rows})
            losses = self._losses(split, having)
            if losses is not None:
                losses.save(folder.losses_file(split), manifest.hash, owner)
            stats = self._stats(split, having, advance).summarised()
            origin = {**(stats.origin or {}), **owner, "manifest": manifest.hash}
            # run and set come first, as a pass writes them
            origin = {**owner, **origin}
            replace(stats, origin=origin).save(folder.stats_file(split))

    def _losses(self, split: str, parts: Sequence[Part]) -> ImageLosses | None:
        files = [part.folder.losses_file(split) for part in parts]
        if not self.identity["settings"].get("per_image") and not all(file.exists() for file in files):
            return None
        found = [
            ImageLosses.load(file, part.manifests[split].hash, {"run": part.id, "set": split})
            for part, file in zip(parts, files, strict=True)
        ]
        order, names = self.orders[split], set.intersection(*(set(losses.tensors()) for losses in found))
        together = {
            name: np.concatenate([losses.tensors()[name].numpy() for losses in found])[order] for name in sorted(names)
        }
        return ImageLosses(together["loss"], together["hits"], together.get("unconditional"))

    def _stats(self, split: str, parts: Sequence[Part], advance: Callable[[int], None]) -> UnitStats:
        """Return the statistics of a set, merged half by half, so that few are in memory at once."""
        if len(parts) == 1:
            (part,) = parts
            stats = UnitStats.load(part.folder.stats_file(split), {"run": part.id, "set": split})
            advance(1)
            return stats
        middle = len(parts) // 2
        one, other = (self._stats(split, half, advance) for half in (parts[:middle], parts[middle:]))
        common = one.class_counts.keys() & other.class_counts.keys()
        if common and (one.rows is None or other.rows is None):
            label = min(common)
            first, second = [part for part in parts if label in part.manifests[split].labels][:2]
            name = self.manifests[split].classes[label]
            raise UsageError(
                f"expected class rows in runs that share a class, got none for {name} in {first} or {second}: "
                "score both with --class-rows keep"
            )
        if "heldout" in self.manifests and (one.matched is None) != (other.matched is None):
            # of one side all images are matched, of the other a part
            one, other = (
                s if s.matched is not None else replace(s, matched=replace(s, rows=None)) for s in (one, other)
            )
        if one.rows is None or other.rows is None:
            # the rows of one side are not kept on, so that what its classes share has to be summed up before
            one, other = one.summarised(), other.summarised()
        return one.merge(other)

    def result(self, folder: RunFolder) -> ScoreResult:
        """Read what ``write`` wrote as the result of a scoring pass, whose seconds are those of all parts together.

        Raises: InputFileError where a file is damaged.
        """
        run = run_id(self.identity)
        owners = {split: {"run": run, "set": split} for split in self.manifests}
        stats = {split: UnitStats.load(folder.stats_file(split), owner) for split, owner in owners.items()}
        losses = {
            split: ImageLosses.load(folder.losses_file(split), self.manifests[split].hash, owner)
            for split, owner in owners.items()
            if folder.losses_file(split).exists()
        }
        seconds = sum(part.document["seconds"] for part in self.parts)
        images = sum(map(len, self.manifests.values()))
        return ScoreResult(
            stats["train"],
            stats.get("heldout"),
            losses.get("train"),
            losses.get("heldout"),
            self.manifests,
            self._skipped(folder, owners),
            self.identity["backend"],
            self.parts[0].document["device"],
            seconds,
            images / max(seconds, 1e-9),
            folder.path,
        )

    def _skipped(self, folder: RunFolder, owners: Mapping[str, Mapping[str, str]]) -> tuple[Skipped, ...]:
        """Return what was left out in the order of a pass: first what listings left out, then images of each set."""
        unread: dict[Skipped, None] = {}
        for split, owner in owners.items():
            document = read_json(folder.skipped_file(split), SKIPPED_SCHEMA, SkippedShape, owner)
            unread |= dict.fromkeys(Skipped(row["name"], row["reason"]) for row in document["images"])
        listed = dict.fromkeys(s for part in self.parts for s in part.skipped if s not in unread)
        return (*listed, *unread)


def _having(parts: Sequence[Part], split: str) -> list[Manifest]:
    return [part.manifests[split] for part in parts if split in part.manifests]
