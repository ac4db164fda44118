"""The documents that stages leave in a run, as the page reads them; entries that it does not show are passed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastmem.extraction.association import Association
from fastmem.sweep.plan import Row


@dataclass(frozen=True)
class KnownReliability:
    """Agreement of a ranking between halves of the images; fields as in ``Reliability``, None where undefined.

    Fields as in ``fastmem.ranking.reliability.Reliability``.
    """

    fraction: float
    spearman: float | None
    overlap: float
    chance: float


@dataclass(frozen=True)
class MeanGap:
    """The mean gap of a segment's units, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class KnownGap:
    """The gap between training and held-out images.

    Attributes:
        images: matched images of each set.
        mean: by segment.
        called: units that stand out.
        tested: units, segments counted apart.
        false_discovery_rate: at which they do.
    """

    images: int
    mean: dict[str, MeanGap]
    called: int
    tested: int
    false_discovery_rate: float


@dataclass(frozen=True)
class KnownMembership:
    """How well a score separates training images from held-out ones; None for intervals that are undefined.

    Fields as in ``fastmem.scoring.membership.Membership``.
    """

    members: int
    nonmembers: int
    auc: float
    auc_low: float | None
    auc_high: float | None
    tpr: float
    tpr_low: float | None
    tpr_high: float | None


@dataclass(frozen=True)
class ScoreDocument:
    """What ``fastmem score`` found.

    Attributes:
        backend: which operators ran.
        device: kind of device.
        seconds: duration of the pass.
        images_per_second: its speed.
        skipped: files that could not be read.
        undefined: scores that so few images do not have, with what they need.
        reliability: by ranking.
        gap: None without a held-out set that matches.
        membership: by score.
        environment: versions and hardware.
    """

    backend: str
    device: str
    seconds: float
    images_per_second: float
    skipped: int
    undefined: dict[str, str]
    reliability: dict[str, KnownReliability]
    gap: KnownGap | None
    membership: dict[str, KnownMembership]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtractSettingsDocument:
    """The settings of an extraction that a command repeats; fields as in ``ExtractSettings``.

    Fields as in ``fastmem.stages.extract.ExtractSettings``.
    """

    top_per_class: int
    batch_size: int
    device: str
    dtype: str


@dataclass(frozen=True)
class ExtractionDocument:
    """What ``fastmem extract`` found; counts are by prefix length, written as a word.

    Attributes:
        edit: name of the edit; None for the unedited model.
        candidates: training images that were attacked.
        threshold: above this similarity an image counts as extracted.
        prefixes: lengths in tokens.
        embedder: who judged.
        index: folder of the index; None where none was searched.
        extracted: candidates that came back.
        extracted_original: the same against the image itself; None where it was not measured.
        extracted_distinct: near-duplicates counted once.
        ceiling: candidates whose own reconstruction passes against the image; None where it was not measured.
        false_alarm_threshold: similarity that 1 % of held-out candidates are above; None without those.
        extracted_at_false_alarms: candidates above it.
        matched_candidates: candidates of the part that matches the held-out set.
        matched_extracted: those of them that came back.
        heldout_candidates: held-out images that were attacked.
        heldout_extracted: those of them that came back.
        associations: whether owners of high units come back more often, by ranking.
        settings: what was asked.
    """

    edit: str | None
    candidates: int
    threshold: float
    prefixes: list[int]
    embedder: str
    index: str | None
    extracted: dict[str, int]
    extracted_original: dict[str, int | None]
    extracted_distinct: dict[str, int]
    ceiling: int | None
    false_alarm_threshold: dict[str, float | None]
    extracted_at_false_alarms: dict[str, int | None]
    matched_candidates: int
    matched_extracted: dict[str, int]
    heldout_candidates: int
    heldout_extracted: dict[str, int]
    associations: dict[str, Association]
    settings: ExtractSettingsDocument

    @property
    def by_prefix(self) -> tuple[Mapping[str, object], ...]:
        """Everything that has an entry for each prefix length."""
        return (
            self.extracted,
            self.extracted_original,
            self.extracted_distinct,
            self.false_alarm_threshold,
            self.extracted_at_false_alarms,
            self.matched_extracted,
            self.heldout_extracted,
        )


@dataclass(frozen=True)
class EvaluateSettingsDocument:
    """The settings of an evaluation that a command repeats; fields as in ``EvaluateSettings``.

    Fields as in ``fastmem.stages.evaluate.EvaluateSettings``.
    """

    seed: int
    batch_size: int
    loss_images: int


@dataclass(frozen=True)
class EvaluationDocument:
    """What ``fastmem evaluate`` found.

    Attributes:
        edit: name of the edit; None for the unedited model.
        samples: how many were drawn.
        metrics: by name.
        features: networks that compared samples.
        reference: what they were compared with.
        notes: what could not be computed.
        settings: what was asked.
    """

    edit: str | None
    samples: int
    metrics: dict[str, float | None]
    features: list[str]
    reference: str | None
    notes: list[str]
    settings: EvaluateSettingsDocument


@dataclass(frozen=True)
class SweepRow:
    """One row of a sweep; the first eight fields as in ``Row``.

    Attributes:
        by: selection.
        fraction: share of all units.
        factor: of their rows.
        seed: of the draw and of the samples.
        scope: "global" or "per-layer".
        merge: of segments.
        graded: whether factors rise with falling score.
        rounds: parts in which units were chosen.
        missing: why the row could not be measured; empty where it was.
        reported: targets that came back; None where it is missing.
        metrics: by name.
    """

    by: str
    fraction: float
    factor: float
    seed: int
    scope: str
    merge: str
    graded: bool
    rounds: int
    missing: str
    reported: int | None
    metrics: dict[str, float | None]

    @property
    def row(self) -> Row:
        """The edit and its seed."""
        return Row(self.by, self.fraction, self.factor, self.seed, self.scope, self.merge, self.graded, self.rounds)


@dataclass(frozen=True)
class SweepDocument:
    """What ``fastmem sweep`` found.

    Attributes:
        judge: who judged.
        threshold: above which a target counts.
        targets: images that were attacked.
        reported_targets: those that no units were chosen by, of which all counts are.
        prefixes: lengths in tokens.
        cost: the metric whose rise is the loss of quality.
        rows: every edit with every seed.
        pareto: positions of the rows that no other beats in both.
    """

    judge: str
    threshold: float
    targets: int
    reported_targets: int
    prefixes: list[int]
    cost: str
    rows: list[SweepRow]
    pareto: list[int]
