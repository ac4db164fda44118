"""Report an extraction as a JSON document, and as a parquet table with a row for every target and prefix length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastmem.data.manifest import Manifest
from fastmem.extraction.association import Association
from fastmem.extraction.extract import Extraction, Verdicts
from fastmem.extraction.verdicts import Count
from fastmem.files import write_table

# edges of the bins of similarity histograms
BINS = np.round(np.linspace(-1, 1, 41), 2)


def counts(verdicts: Verdicts, among: np.ndarray, original: bool = False) -> list[Count]:
    """Return, for every prefix length, how many of the targets that ``among``, bool [N], marks are extracted.

    ``original`` compares completions with the images themselves, rather than with the tokenizer's reconstructions.
    """
    found = verdicts.extracted_original if original else verdicts.extracted
    return [Count(int((row & among).sum()), int(among.sum())) for row in found]


def describe(extraction: Extraction, associations: Mapping[str, Association]) -> dict[str, Any]:
    """Return the results of an extraction as a dictionary for a JSON document, without the run and the edit.

    ``associations`` say, by ranking, whether owners of high-scoring units are extracted more often.
    """
    train, heldout = extraction.sets["train"], extraction.sets.get("heldout")
    keys = [str(p) for p in extraction.prefixes]
    judged = not np.isnan(train.original).all()
    thresholds = extraction.false_alarm_thresholds()
    document = {
        "candidates": int(train.candidate.sum()),
        "threshold": extraction.threshold,
        "prefix_unit": "tokens",
        "prefixes": list(extraction.prefixes),
        "embedder": extraction.judge,
        "index": extraction.index,
        "extracted": _by_prefix(keys, [c.k for c in counts(train, train.candidate)]),
        "extracted_interval": _by_prefix(keys, [_interval(c) for c in counts(train, train.candidate)]),
        "extracted_original": _by_prefix(
            keys, [c.k if judged else None for c in counts(train, train.candidate, original=True)]
        ),
        "extracted_distinct": _by_prefix(keys, [train.distinct(p) for p in range(len(keys))]),
        "ceiling": int((train.ceiling[train.candidate] > extraction.threshold).sum()) if judged else None,
        "token_match": _by_prefix(keys, [_mean(row[train.candidate]) for row in train.match]),
        "false_alarm_threshold": _by_prefix(keys, [None if t is None else round(t, 6) for t in thresholds]),
        "extracted_at_false_alarms": _by_prefix(
            keys,
            [
                None if t is None else int((row[train.candidate] > t).sum())
                for t, row in zip(thresholds, train.similarity, strict=True)
            ],
        ),
        "matched_candidates": int(train.matched.sum()),
        "matched_extracted": _by_prefix(keys, [c.k for c in counts(train, train.matched)]),
        "heldout_candidates": 0 if heldout is None else int(heldout.candidate.sum()),
        "heldout_extracted": _by_prefix(
            keys, [0] * len(keys) if heldout is None else [c.k for c in counts(heldout, heldout.candidate)]
        ),
        "histogram": {
            "edges": BINS.tolist(),
            **{split: _histogram(keys, verdicts) for split, verdicts in extraction.sets.items()},
        },
        "associations": {by: a.document() for by, a in associations.items()},
    }
    if heldout is not None:
        document["heldout_interval"] = _by_prefix(keys, [_interval(c) for c in counts(heldout, heldout.candidate)])
        near = heldout.twin_similarity[heldout.candidate]
        known = not np.isnan(near).all()
        document["heldout_near_training"] = int((near > extraction.threshold).sum()) if known else None
    return document


def _by_prefix(keys: list[str], values: list[Any]) -> dict[str, Any]:
    return dict(zip(keys, values, strict=True))


def _mean(values: np.ndarray) -> float | None:
    """The mean, or None of no values."""
    return round(float(values.mean()), 6) if len(values) else None


def _interval(count: Count) -> list[float]:
    return [round(end, 6) for end in count.interval]


def _histogram(keys: list[str], verdicts: Verdicts) -> dict[str, list[int]]:
    rows = verdicts.similarity[:, verdicts.candidate]
    return _by_prefix(keys, [np.histogram(row, BINS)[0].tolist() for row in rows])


def write_verdicts(
    path: Path, extraction: Extraction, manifests: Mapping[str, Manifest], owner: Mapping[str, str] | None = None
) -> None:
    """Write a parquet table with one row for each target and prefix length.

    The columns are id, set, class, label, name, candidate, matched, candidate_score, prefix, token_match, similarity,
    extracted, similarity_to_image, extracted_image, ceiling, nearest_id, nearest_name, nearest_similarity,
    twin_similarity and group; values that were not measured are null.

    Args:
        path: the file.
        extraction: the verdicts.
        manifests: the images by set.
        owner: entries of the file's metadata that say which run and settings it is of.

    Raises: UsageError where the file cannot be written.
    """
    import pyarrow

    train = manifests["train"]
    names = dict(zip(train.ids.tolist(), train.names.tolist(), strict=True))
    tables = []
    for split, v in extraction.sets.items():
        for p, prefix in enumerate(extraction.prefixes):
            count = len(v.targets)
            original = _or_null(v.original[p])
            tables.append(
                pyarrow.table(
                    {
                        "id": v.targets.ids,
                        "set": pyarrow.array([split] * count),
                        "class": [manifests[split].classes[label] for label in v.targets.labels],
                        "label": v.targets.labels,
                        "name": list(v.targets.names),
                        "candidate": v.candidate,
                        "matched": v.matched,
                        "candidate_score": v.targets.scores,
                        "prefix": pyarrow.array([prefix] * count, pyarrow.int32()),
                        "token_match": v.match[p],
                        "similarity": v.similarity[p],
                        "extracted": v.extracted[p],
                        "similarity_to_image": original,
                        "extracted_image": pyarrow.array(v.extracted_original[p], mask=np.isnan(v.original[p])),
                        "ceiling": _or_null(v.ceiling),
                        "nearest_id": pyarrow.array(v.nearest[p], mask=v.nearest[p] < 0),
                        "nearest_name": pyarrow.array([names.get(i) for i in v.nearest[p].tolist()], pyarrow.string()),
                        "nearest_similarity": _or_null(v.nearest_similarity[p]),
                        "twin_similarity": _or_null(v.twin_similarity),
                        "group": v.groups,
                    }
                )
            )
    write_table(path, pyarrow.concat_tables(tables), owner)


def _or_null(values: np.ndarray) -> Any:
    import pyarrow

    return pyarrow.array(values, mask=np.isnan(values))
