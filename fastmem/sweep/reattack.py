"""Attacking an edited model again: other prefixes, other views, other candidates, and rows scaled back.

The same attacks on the unedited model stand beside each count, for a longer prefix gives more of any image away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Mirrored, Views
from fastmem.extraction.attack import attack
from fastmem.extraction.candidates import Targets, collect_losses, find_targets, highest_per_class
from fastmem.extraction.verdicts import Judge
from fastmem.files import read_json, write_json
from fastmem.mitigation.scaling import Units, scale_units
from fastmem.models.model import Model
from fastmem.reporter import SILENT, Reporter
from fastmem.scoring.image_losses import ImageLosses
from fastmem.sweep.plan import Row
from fastmem.sweep.row_norms import SuspectRows, find_rows_scaled_by, find_small_rows
from fastmem.sweep.table import RowUnavailable
from fastmem.tokens.cache import TokenCache
from fastmem.tokens.true_images import read_true_images

SCHEMA = "fastmem.re-attack/1"
# shares of an image's tokens: one shorter than the ladder's longest prefix, which is about an eighth, and two longer
PREFIX_SHARES = (1 / 16, 1 / 4, 1 / 2)


class Editor(Protocol):
    """Makes a row's edit while entered, as ``fastmem.sweep.table.Bench``."""

    def edited(self, row: Row) -> AbstractContextManager[int]: ...


@dataclass(frozen=True, eq=False)
class Approach:
    """One way to attack: whose images, by their tokens, and how many of these the attacker has."""

    name: str
    targets: Targets
    prefix: int


@dataclass(frozen=True)
class Attempt:
    """What an approach found: how many of its targets the unedited model gives away, and how many the edited one."""

    approach: str
    prefix: int
    targets: int
    before: int
    after: int


@dataclass(frozen=True)
class Rescaling:
    """What an attacker gains who looks for scaled rows and scales them back.

    knows: what of the edit; found, wrong: rows taken for scaled that are, and that are not; extracted: targets, from
    the model with all of those scaled back.
    """

    knows: str
    found: int
    wrong: int
    extracted: int


@dataclass(frozen=True)
class ReAttack:
    """All attempts on one edit. units: how many are scaled; rescalings: empty for rows of zeros, which hold nothing."""

    row: Row
    units: int
    attempts: tuple[Attempt, ...]
    rescalings: tuple[Rescaling, ...]

    def record(self) -> dict[str, Any]:
        """As the file and ``--json`` have it."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> ReAttack:
        """What ``record`` gave."""
        attempts = tuple(Attempt(**a) for a in record["attempts"])
        return cls(Row(**record["row"]), record["units"], attempts, tuple(Rescaling(**r) for r in record["rescalings"]))


class Attacker:
    """Attacks a model's edits again, with what is the same for all of them prepared once.

    source, manifest: the training images; targets: those that no edit was chosen by; chosen_by: int64 ids of the
    others; prefix: the published attack's, in tokens; cache: of tokens, since every edit is tried on all images.
    """

    def __init__(
        self,
        model: Model,
        source: ImageSource,
        manifest: Manifest,
        judge: Judge,
        targets: Targets,
        chosen_by: np.ndarray,
        prefix: int,
        cache: TokenCache | None = None,
    ) -> None:
        self.model, self.source, self.manifest, self.judge = model, source, manifest, judge
        self.chosen_by, self.prefix, self.cache = chosen_by, prefix, cache
        self.approaches = self._approaches(targets)
        self.before = [self._count(approach) for approach in self.approaches]

    def attack_again(
        self,
        row: Row,
        editor: Editor,
        state: Path | None = None,
        reporter: Reporter = SILENT,
    ) -> ReAttack:
        """Every approach on one edit.

        Args:
            row: the edit.
            editor: makes the edit.
            state: file in which the pass over all images for other candidates is kept, so that it goes on.
            reporter: is told of the images of that pass.

        Raises: RowUnavailable where the edit's units cannot be chosen.
        """
        with editor.edited(row) as units:
            after = [self._count(approach) for approach in self.approaches]
            others = self._other_candidates(state, reporter)
            others_after = self._count(others)
            rescalings = tuple(self._rescalings(row, units))
        counts = [*zip(self.approaches, self.before, after, strict=True), (others, self._count(others), others_after)]
        attempts = [Attempt(a.name, a.prefix, len(a.targets), b, c) for a, b, c in counts]
        return ReAttack(row, units, tuple(attempts), rescalings)

    def _count(self, approach: Approach) -> int:
        """Targets that the model gives away as it is."""
        generated = attack(self.model, approach.targets, [approach.prefix])
        similarity = self.judge.similarities(self.model, approach.targets, [approach.prefix], generated)
        return int((similarity > self.judge.threshold).sum())

    def _approaches(self, targets: Targets) -> list[Approach]:
        """The published attack, then other prefixes, then other views of the same images."""
        published = Approach("as published", targets, self.prefix)
        lengths = [Approach(f"prefix of {n} tokens", targets, n) for n in other_prefixes(self.model, self.prefix)]
        crop = self._see(targets, self.model.view_recipe(1))
        mirror = self._see(targets, Mirrored(self.model.view_recipe("center")))
        return [
            published,
            *lengths,
            Approach("prefix from another crop", crop, self.prefix),
            Approach("prefix from the mirror image", mirror, self.prefix),
        ]

    def _see(self, targets: Targets, recipe: Views) -> Targets:
        """The same images in the first view of ``recipe``: what comes back is compared with that view."""
        positions = np.flatnonzero(np.isin(self.manifest.ids, targets.ids))
        found = read_true_images(self.model, self.source, self.manifest, positions, recipe=recipe, cache=self.cache)
        return replace(targets.take(np.isin(targets.ids, found.ids)), tokens=found.tokens)

    def _other_candidates(self, state: Path | None = None, reporter: Reporter = SILENT) -> Approach:
        """The highest of every class by the model as it is, without those that the edit was chosen by."""
        if state is not None and state.exists():
            hits = ImageLosses.load(state, self.manifest.hash).hits
            reporter.advance(len(self.manifest))
        else:
            hits = collect_losses(
                self.model, self.source, self.manifest, state, cache=self.cache, reporter=reporter
            ).hits
        hits[np.isin(self.manifest.ids, self.chosen_by)] = np.nan
        positions = highest_per_class(self.manifest, hits)
        found = find_targets(self.model, self.source, self.manifest, hits, positions, cache=self.cache)
        return Approach("candidates of the edited model", found, self.prefix)

    def _rescalings(self, row: Row, units: int) -> list[Rescaling]:
        if row.factor == 0:
            return []
        share = units / (self.model.num_layers * self.model.num_units)
        suspects = {
            "that rows were made smaller": find_small_rows(self.model),
            "the factor and the share of rows": find_rows_scaled_by(self.model, row.factor, share),
        }
        edited = self._keys(self.model.edits)
        return [self._rescale(knows, rows, edited) for knows, rows in suspects.items()]

    def _rescale(self, knows: str, rows: SuspectRows, edited: set[int]) -> Rescaling:
        found = len(self._keys([rows]) & edited)
        with scale_units(self.model, rows, rows.factor):
            return Rescaling(knows, found, len(rows) - found, self._count(self.approaches[0]))

    def _keys(self, edits: Sequence[Units]) -> set[int]:
        return {k for edit in edits for k in (edit.layer * self.model.num_units + edit.unit).tolist()}


def other_prefixes(model: Model, prefix: int) -> list[int]:
    """Prefixes, in tokens, that are not ``prefix``: those that the model allows nearest to a 1/16, 1/4 and 1/2."""
    nearest = [min(model.prefix_lengths, key=lambda n: abs(n - share * model.num_tokens)) for share in PREFIX_SHARES]
    return [n for n in dict.fromkeys(nearest) if n not in (prefix, model.num_tokens)]


def attack_edits_again(
    make_attacker: Callable[[], Attacker],
    rows: Sequence[Row],
    editor: Editor,
    folder: Path,
    reporter: Reporter = SILENT,
) -> list[ReAttack]:
    """``attack_again`` for every row whose units can be chosen, a file each; files that are there are read.

    Args:
        make_attacker: is called once, where a file is missing.
        rows: the edits.
        editor: makes them.
        folder: where the files lie.
        reporter: is told of the images of every edit's pass over all of them.

    Raises: InputFileError for a damaged file; UsageError where the folder cannot be written. KeyboardInterrupt keeps
    what was done.
    """
    found, attacker = [], None
    for row in rows:
        file, state = folder / f"{row.key}.json", folder / f"{row.key}-candidates.safetensors"
        if not file.exists():
            attacker = attacker or make_attacker()
            try:
                made = attacker.attack_again(row, editor, state, reporter)
            # the table has the row with the reason
            except RowUnavailable:
                continue
            write_json(file, {"schema": SCHEMA, **made.record()})
            state.unlink(missing_ok=True)
        found.append(ReAttack.of(read_json(file, SCHEMA)))
    return found
