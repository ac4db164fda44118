"""Attack an edited model in other ways: other prefix lengths, other views, other candidates, and rows scaled back.

The unedited model is attacked in the same ways, because for instance a longer prefix extracts more from any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.data.sources import ImageSource
from fastmem.data.views import Mirrored, Views
from fastmem.extraction.attack import attack
from fastmem.extraction.candidates import (
    Targets,
    collect_losses,
    find_targets,
    highest_per_class,
    progress_file,
)
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

SCHEMA = "fastmem.re-attack/2"
# prefix lengths as shares of an image's tokens: one below and two above that of the usual attack, about an eighth
PREFIX_SHARES = (1 / 16, 1 / 4, 1 / 2)


Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Editor(Protocol):
    """An object that makes the edit of a row."""

    def edited(self, row: Row) -> AbstractContextManager[int]:
        """Return a context in which the model has the row's edit, and whose value is the number of scaled units."""


@dataclass(frozen=True, eq=False)
class Approach:
    """One way to attack: the images to attack, with their tokens, and the prefix length in tokens."""

    name: str
    targets: Targets
    prefix: Count


@dataclass(frozen=True)
class Attempt:
    """The result of one way to attack an edit.

    Attributes:
        approach: name of the way to attack.
        prefix: prefix length, in tokens.
        targets: number of targets.
        before: number of targets extracted from the unedited model.
        after: number of targets extracted from the edited model.
    """

    approach: str
    prefix: Count
    targets: Count
    before: Count
    after: Count


@dataclass(frozen=True)
class Rescaling:
    """The result of an attacker who looks for rows that an edit scaled, scales them back and attacks again.

    Attributes:
        knows: what the attacker knows about the edit.
        found: number of rows scaled back that the edit had scaled.
        wrong: number of rows scaled back that the edit had not scaled.
        extracted: number of targets extracted afterwards.
    """

    knows: str
    found: Count
    wrong: Count
    extracted: Count


@dataclass(frozen=True)
class ReAttack:
    """The results of all attacks on one edit.

    Attributes:
        row: the edit.
        units: number of units that the edit scales.
        attempts: a result for each way to attack.
        rescalings: results of attackers who scale rows back; empty where the edit sets rows to 0, because then nothing
            is left to scale.
    """

    row: Row
    units: Count
    attempts: tuple[Attempt, ...]
    rescalings: tuple[Rescaling, ...]

    def record(self) -> dict[str, Any]:
        """Return the results as a dictionary for a JSON document."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path, row: Row, sweep: str) -> ReAttack:
        """Read the results of one edit from the file that `save` wrote.

        Raises: InputFileError where it is missing or damaged, or holds another edit or one of another sweep.
        """
        record = read_json(path, SCHEMA, cls, {"sweep": sweep, "row": asdict(row)})
        attempts = tuple(Attempt(**_known(Attempt, entry)) for entry in record["attempts"])
        rescalings = tuple(Rescaling(**_known(Rescaling, entry)) for entry in record["rescalings"])
        return cls(row, record["units"], attempts, rescalings)

    def save(self, path: Path, sweep: str) -> None:
        """Write the results to a file; ``sweep`` is the id of what all edits of a sweep have in common.

        Raises: UsageError where the folder cannot be written.
        """
        write_json(path, {"schema": SCHEMA, "sweep": sweep, **self.record()})


def _known(kind: type[Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that a dataclass has; others may stand beside them."""
    return {field.name: entry[field.name] for field in fields(kind)}


class Attacker:
    """Attacks edits of a model in several ways; what does not depend on the edit is computed once.

    Attributes:
        approaches: the ways to attack whose targets do not depend on the edit.
        before: number of targets that each of them extracts from the unedited model.
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
        """Prepare the ways to attack, and attack the unedited model.

        Args:
            model: the unedited model.
            source: the training images.
            manifest: the order of the training images.
            judge: measures how similar completions and their targets are.
            targets: targets that no units were chosen on.
            chosen_by: ids of the targets that units may have been chosen on, int64 [m]; they are not attacked.
            prefix: prefix length of the usual attack, in tokens.
            cache: where tokens are looked up; useful, because all training images are encoded for every edit.
        """
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
        sweep: str = "",
    ) -> ReAttack:
        """Attack one edit in every way.

        Args:
            row: the edit.
            editor: makes the edit.
            state: file where the pass that looks for other candidates among all images is saved, so that it can be
                resumed; None saves nothing.
            reporter: is given the number of images that this pass has done.
            sweep: id of what all edits have in common, which the saved pass carries.

        Raises: RowUnavailable where the units of the edit cannot be chosen.
        """
        with editor.edited(row) as units:
            after = [self._count(approach) for approach in self.approaches]
            others = self._other_candidates({"sweep": sweep, "edit": row.key}, state, reporter)
            others_after = self._count(others)
            rescalings = tuple(self._rescalings(row, units))
        counts = [*zip(self.approaches, self.before, after, strict=True), (others, self._count(others), others_after)]
        attempts = [Attempt(a.name, a.prefix, len(a.targets), b, c) for a, b, c in counts]
        return ReAttack(row, units, tuple(attempts), rescalings)

    def _count(self, approach: Approach) -> int:
        """Return the number of targets extracted from the model with its present edits."""
        generated = attack(self.model, approach.targets, [approach.prefix])
        similarity = self.judge.similarities(self.model, approach.targets, [approach.prefix], generated)
        return int((similarity > self.judge.threshold).sum())

    def _approaches(self, targets: Targets) -> list[Approach]:
        """Return the published attack, then those with other prefix lengths, then those with other views."""
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
        """Return the same images with the tokens of the first view of ``recipe``, so that they are attacked with it."""
        positions = np.flatnonzero(np.isin(self.manifest.ids, targets.ids))
        found = read_true_images(self.model, self.source, self.manifest, positions, recipe=recipe, cache=self.cache)
        return replace(targets.take(np.isin(targets.ids, found.ids)), tokens=found.tokens)

    def _other_candidates(self, owner: dict[str, str], state: Path | None, reporter: Reporter) -> Approach:
        """Return an attack on the best candidates of the edited model, without images that units were chosen on."""
        if state is not None and state.exists():
            hits = ImageLosses.load(state, self.manifest.hash, owner).hits
            reporter.advance(len(self.manifest))
        else:
            hits = collect_losses(
                self.model, self.source, self.manifest, state, cache=self.cache, owner=owner, reporter=reporter
            ).hits
        hits[np.isin(self.manifest.ids, self.chosen_by)] = np.nan
        positions = highest_per_class(self.manifest, hits)
        found = find_targets(self.model, self.source, self.manifest, hits, positions, cache=self.cache)
        return Approach("candidates of the edited model", found, self.prefix)

    def _rescalings(self, row: Row, units: int) -> list[Rescaling]:
        """Return the results of attackers who scale rows back, by what they know about the edit."""
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
        """Scale rows back, attack, and undo it; ``edited`` holds the numbers of the rows that the edit scaled."""
        found = len(self._keys([rows]) & edited)
        with scale_units(self.model, rows, rows.factor):
            return Rescaling(knows, found, len(rows) - found, self._count(self.approaches[0]))

    def _keys(self, edits: Sequence[Units]) -> set[int]:
        """Return a number for each unit of some edits."""
        return {k for edit in edits for k in (edit.layer * self.model.num_units + edit.unit).tolist()}


def other_prefixes(model: Model, prefix: int) -> list[int]:
    """Return the allowed prefix lengths nearest to 1/16, 1/4 and 1/2 of an image's tokens, other than ``prefix``."""
    nearest = [min(model.prefix_lengths, key=lambda n: abs(n - share * model.num_tokens)) for share in PREFIX_SHARES]
    return [n for n in dict.fromkeys(nearest) if n not in (prefix, model.num_tokens)]


def attack_edits_again(
    make_attacker: Callable[[], Attacker],
    rows: Sequence[Row],
    editor: Editor,
    folder: Path,
    reporter: Reporter = SILENT,
    sweep: str = "",
) -> list[ReAttack]:
    """Attack every edit in all ways, and save the results of each to a file, which later calls read.

    Edits whose units cannot be chosen are left out.

    Args:
        make_attacker: makes the attacker; it is called once, and only where a file is missing.
        rows: the edits.
        editor: makes the edits.
        folder: where the files are saved.
        reporter: is given the number of images done in each edit's pass over all training images.
        sweep: id of what all edits have in common, which the files carry.

    Raises: InputFileError where a file is damaged; UsageError where the folder cannot be written; KeyboardInterrupt on
    Ctrl-C, after the progress was saved.
    """
    found, attacker = [], None
    for row in rows:
        file, state = folder / f"{row.key}.json", folder / f"{row.key}-candidates.safetensors"
        if not file.exists():
            attacker = attacker or make_attacker()
            try:
                made = attacker.attack_again(row, editor, state, reporter, sweep)
            # the table of the sweep says why the units cannot be chosen
            except RowUnavailable:
                continue
            made.save(file, sweep)
        # whoever was killed after writing the file left them
        for left in (state, progress_file(state)):
            left.unlink(missing_ok=True)
        found.append(ReAttack.load(file, row, sweep))
    return found
