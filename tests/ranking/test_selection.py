"""Selections of units against a literal version, their reliability, and what is refused."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from fastmem import UsageError, owners, reliability, select
from fastmem.ranking.ownership import owned_units
from fastmem.ranking.selection import SELECTIONS
from tests.ranking.conftest import build_wide, literal_scores, wide
from tests.stats.conftest import CASES, SHAPE, build, literal_contrast, make_data, take

LAYERS, _, UNITS = SHAPE
RANKED = [0]


@pytest.mark.parametrize("by", ["unitmem", "within-class", "class-selectivity", "mean", "variance"])
@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_a_selection_ranks_by_its_literal_score(data, by):
    # of the two segments the second is class-only and never enters
    scores = literal_scores(data)[by][:, RANKED].max(1).ravel()
    stats = build(data)
    if by in stats.undefined:
        with pytest.raises(UsageError, match=stats.undefined[by]):
            select(stats, fraction=0.5, by=by)
        return
    found = select(stats, fraction=0.5, by=by)
    assert len(found) == 3
    np.testing.assert_allclose(found.score, np.sort(scores)[::-1][:3], atol=1e-9)
    chosen = (found.layer * UNITS + found.unit).numpy()
    np.testing.assert_allclose(scores[chosen], found.score, atol=1e-9)
    # equal scores keep the order of layer and unit
    for (a, first), (b, second) in zip(
        zip(chosen, found.score.tolist(), strict=True),
        list(zip(chosen, found.score.tolist(), strict=True))[1:],
        strict=False,
    ):
        assert first > second or (first == second and a < b)


@pytest.mark.parametrize(("merge", "literal"), [("max", np.max), ("mean", np.mean), ("sum", np.sum)])
def test_segments_merge_as_asked(merge, literal):
    data = wide()
    scores = literal(literal_scores(data)["unitmem"], 1).ravel()
    found = select(build_wide(data), 0.1, merge=merge)
    assert (found.layer * 40 + found.unit).tolist() == np.argsort(-scores, kind="stable")[:12].tolist()
    np.testing.assert_allclose(found.score, np.sort(scores)[::-1][:12], atol=1e-12)


@pytest.mark.parametrize(("fraction", "count"), [(1e-6, 1), (0.05, 6), (0.0542, 7), (0.5, 60), (1.0, 120)])
def test_the_number_of_units_is_a_rounded_share_and_at_least_one(fraction, count):
    stats = build_wide(wide())
    for by in ("unitmem", "random", "lowest"):
        for scope in ("global", "per-layer"):
            found = select(stats, fraction, by, scope=scope)
            assert len(found) == count
            assert len(set(zip(found.layer.tolist(), found.unit.tolist(), strict=True))) == count


def test_per_layer_takes_the_same_number_of_every_layer():
    data = wide()
    scores = literal_scores(data)["unitmem"].max(1)
    found = select(build_wide(data), 20 / 120, scope="per-layer")
    assert np.bincount(found.layer).tolist() == [7, 7, 6]
    for layer, count in enumerate((7, 7, 6)):
        expected = np.argsort(-scores[layer], kind="stable")[:count]
        assert found.unit[found.layer == layer].tolist() == expected.tolist()
    assert found.score.tolist() == sorted(found.score.tolist(), reverse=True)


def test_lowest_is_the_other_end():
    stats = build_wide(wide())
    scores = stats.unitmem().amax(1).flatten()
    found = select(stats, 0.1, "lowest")
    assert found.score.tolist() == scores.sort().values[:12].tolist()


def test_random_follows_the_seed_and_covers_all_units():
    stats = build_wide(wide())

    def chosen(seed: int) -> list[int]:
        found = select(stats, 0.1, "random", seed=seed)
        return (found.layer * 40 + found.unit).tolist()

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    counts = np.bincount(np.concatenate([chosen(seed) for seed in range(400)]), minlength=120)
    # 400 draws of 12 in 120: 40 each, with a standard deviation of 6
    assert counts.min() > 15
    assert counts.max() < 70


def test_matched_units_share_layer_and_mean_response_and_are_others():
    data = wide()
    # many units of like mean, so that partners exist
    data["responses"] = (np.random.default_rng(1).gamma(0.7, 1.0, (40, 2, 3, 2, 400))).astype(np.float32)
    stats = build_wide(data)
    target = select(stats, 0.05)
    found = select(stats, 0.05, "matched", seed=3)
    assert len(found) == len(target) == 60
    assert found.layer.tolist() == target.layer.tolist()
    keys = [set(zip(s.layer.tolist(), s.unit.tolist(), strict=True)) for s in (found, target)]
    assert len(keys[0]) == 60
    assert not keys[0] & keys[1]
    means = stats.mean.amax(1)
    apart = (means[found.layer, found.unit] / means[target.layer, target.unit] - 1).abs()
    assert int((apart > 0.05).sum()) == found.unmatched
    assert found.unmatched < 6
    again = select(stats, 0.05, "matched", seed=3)
    assert again.unit.tolist() == found.unit.tolist()
    assert select(stats, 0.05, "matched", seed=4).unit.tolist() != found.unit.tolist()
    other = select(stats, 0.05, "variance")
    own = select(stats, 0.05, "matched", matched_with=other)
    assert own.layer.tolist() == other.layer.tolist()


def test_a_unit_without_a_partner_gets_the_nearest_and_is_counted():
    data = wide()
    scale = np.ones((1, 1, 3, 2, 40), np.float32)
    scale[..., 0, :, 5] = 1e4
    data["responses"] = np.full((40, 2, 3, 2, 40), 1.0, np.float32) * scale
    data["responses"][0, :, 0, :, 5] *= 3
    stats = build_wide(data)
    found = select(stats, 1 / 120, "matched")
    assert (found.layer.tolist(), found.unmatched) == ([0], 1)
    assert found.unit.tolist() != [5]


def test_own_scores_are_followed():
    stats = build_wide(wide())
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = select(stats, 0.1, "scores", scores=scores)
    assert found.score.tolist() == scores.flatten().sort(descending=True).values[:12].tolist()
    assert torch.equal(scores[found.layer, found.unit], found.score)


def test_the_gap_needs_a_matched_heldout_set():
    train = build_wide(wide(40))
    other = wide(40, seed=2)
    other["labels"] = wide(40)["labels"]
    heldout = build_wide(other)
    scores = (train.unitmem() - heldout.unitmem()).amax(1).flatten()
    found = select(train, 0.1, "gap", heldout=heldout)
    assert found.score.tolist() == scores.sort(descending=True).values[:12].tolist()
    smaller = build_wide(take(other, np.arange(40) % 2 == 0))
    with pytest.raises(UsageError, match="equal size and classes, got 40 and 20 images"):
        select(train, 0.1, "gap", heldout=smaller)
    with pytest.raises(UsageError, match="same units and segments"):
        select(train, 0.1, "gap", heldout=build(make_data(10, 2)))


REFUSED = {
    "by": ({"by": "size"}, f"one of {', '.join(SELECTIONS)}"),
    "scope": ({"scope": "block"}, "scope global or per-layer"),
    "merge": ({"merge": "min"}, "merge as one of max, mean, sum"),
    "no fraction": ({"fraction": 0.0}, "above 0 and up to 1"),
    "too large a fraction": ({"fraction": 5}, "above 0 and up to 1"),
    "no held-out": ({"by": "gap"}, "score with --heldout"),
    "scores missing": ({"by": "scores"}, "scores together with by='scores'"),
    "scores unasked": ({"scores": torch.zeros(3, 40)}, "scores together with by='scores'"),
    "scores of another shape": ({"by": "scores", "scores": torch.zeros(40, 3)}, r"shape \[3, 40\], got \[40, 3\]"),
    "scores with NaN": ({"by": "scores", "scores": torch.full((3, 40), torch.nan)}, "finite scores"),
    "too many to match": ({"by": "matched", "fraction": 0.9}, "at most half of a layer's units"),
}


@pytest.mark.parametrize(("change", "text"), REFUSED.values(), ids=REFUSED)
def test_wrong_selections_are_refused(change, text):
    with pytest.raises(UsageError, match=text):
        select(build_wide(wide()), **change)


def test_matching_with_a_selection_is_for_matched_units_only():
    stats = build_wide(wide())
    with pytest.raises(UsageError, match="matched_with with by='matched' only"):
        select(stats, matched_with=select(stats))


def test_class_only_segments_alone_cannot_be_ranked():
    stats = build_wide(wide(), ("class", "scale1"), ("class", "scale1"))
    with pytest.raises(UsageError, match="a segment that sees image tokens"):
        select(stats)


@pytest.mark.parametrize("by", ["unitmem", "within-class", "class-selectivity", "mean", "variance", "lowest"])
def test_reliability_equals_the_literal_split_halves(by):
    data = wide(61)
    found = reliability(build_wide(data), 0.1, by)
    correlations, overlaps = [], []
    for half in combinations(range(4), 2):
        if 0 not in half:
            continue
        scores = []
        for side in (half, tuple(set(range(4)) - set(half))):
            part = take(data, np.isin(data["folds"], side))
            scores.append(literal_scores(part)["unitmem" if by == "lowest" else by].max(1).ravel())
        correlations.append(np.corrcoef(*(rankdata(s) for s in scores))[0, 1])
        sign = 1 if by == "lowest" else -1
        chosen = [set(np.argsort(sign * s, kind="stable")[:12].tolist()) for s in scores]
        overlaps.append(len(chosen[0] & chosen[1]) / 12)
    assert found.halves == 3
    assert found.spearman == pytest.approx(np.mean(correlations), abs=1e-9)
    assert found.overlap == pytest.approx(np.mean(overlaps), abs=1e-12)
    assert found.chance == pytest.approx(0.1)
    assert f"ranking by {by} on split halves" in str(found)


def test_reliability_is_told_only_where_there_is_one(tmp_path):
    stats = build_wide(wide())
    assert reliability(stats, by="random") is None
    assert reliability(stats, by="matched") is None
    assert reliability(build(make_data(3, 1)), by="unitmem") is None
    # equal scores are no ranking
    assert reliability(build(make_data(12, 2, kind="equal"))) is None
    # without class rows halves that share classes have no class-level scores
    dropped = build(make_data(30, 3), keep_rows=False)
    assert reliability(dropped, by="within-class") is None
    assert reliability(dropped, by="unitmem") is not None
    # a ranking of fixed units repeats itself, one of noise does not
    fixed = wide()
    fixed["responses"] = np.repeat(fixed["responses"][:, :1] * 0 + 1, 2, 1)
    fixed["responses"][:4] += np.linspace(0, 1, 40, dtype=np.float32)
    fixed["folds"] = np.arange(40) % 4
    assert reliability(build_wide(fixed)).overlap == 1.0


@pytest.mark.parametrize("by", ["unitmem", "within-class"])
@pytest.mark.parametrize(
    "data", [CASES["random"], CASES["ties"], CASES["one class"]], ids=["random", "ties", "one class"]
)
def test_owners_are_the_images_behind_the_scores(data, by):
    stats = build(data)
    selection = select(stats, 1.0, by)
    image = data["responses"].astype(np.float64).mean(1).astype(np.float32)
    scores = literal_scores(data)
    found = owners(stats, selection).tolist()
    for layer, unit, owner in zip(selection.layer.tolist(), selection.unit.tolist(), found, strict=True):
        column = image[:, layer, 0, unit]
        if by == "unitmem":
            expected = min(data["ids"][column == column.max()])
        else:
            candidates = []
            for label in np.unique(data["labels"]):
                rows = np.flatnonzero(data["labels"] == label)
                score = literal_contrast(image[rows].astype(np.float64))[layer, 0, unit]
                if np.isclose(score, scores[by][layer, 0, unit], atol=1e-12):
                    candidates.append(min(data["ids"][rows[column[rows] == column[rows].max()]]))
            expected = min(candidates)
        assert owner == expected
    counts = owned_units(data["ids"], owners(stats, selection))
    assert counts.sum() == len(selection)
    assert counts[data["ids"].tolist().index(found[0])] == found.count(found[0])
